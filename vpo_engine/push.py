"""Publish the policy of a finished run on the Hugging Face Hub, with a model card made from the run.

    vpo push RUN USER/NAME [--dry-run]     (or python -m vpo_engine.push)

What is published is what vpo_engine.export makes of the run, where the model has a diffusers pipeline: a complete
folder, or an adapter. Of other models it is the policy in its own layout, or the adapter in PEFT's format.
--dry-run writes the folder that would be uploaded to RUN/hub, prints the card, and sends nothing. Log in first with
hf auth login, or set HF_TOKEN. Neither prompts nor local paths are published.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vpo_engine.command import Parser, report_errors
from vpo_engine.config_file import load_config
from vpo_engine.export import export
from vpo_engine.exporting.folder import link_or_copy
from vpo_engine.exporting.options import ExportOptions
from vpo_engine.help_text import HelpFormatter
from vpo_engine.model_card import card
from vpo_engine.models.registry import model_family
from vpo_engine.runs.checkpoint import evaluated_policy, newest_complete, verify_checkpoint
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.texts import read_json, say

_ADAPTER = "adapter_config.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="vpo push", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "repo", metavar="USER/NAME", help="repository on the Hub; it is made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, and print the card")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="complete published folder of the model, for a run whose model.policy is a bare transformer",
    )
    given = parser.parse_args(arguments)
    return report_errors(lambda: push(given.run, given.repo, given.private, given.dry_run, given.base))


def push(root: Path, repo: str, private: bool, dry_run: bool, base: Path | None = None) -> int:
    """Publish the last policy of the run at ``root`` as ``repo``; return the exit code.

    base: see ``vpo_engine.export.ExportOptions``.
    ValueError for a run that has not finished, for a name that is none, and for whatever the Hub refuses.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    run = RunDirectory.open(root)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} cannot be the name of a repository ({error}); give USER/NAME") from error
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} cannot be the name of a repository; give USER/NAME")
    folder = write_folder(run, repo, base)
    if dry_run:
        say((folder / "README.md").read_text(encoding="utf-8"))
        say(f"nothing was sent; the folder that would be uploaded is {folder}")
        return 0
    say(f"published at {_upload(folder, repo, private)}")
    return 0


def write_folder(run: RunDirectory, repo: str, base: Path | None = None) -> Path:
    """Write the run's last policy and its card to the folder ``hub`` of the run, anew, and return it.

    With ema.decay it is the moving average, whose numbers the card has.
    """
    newest = newest_complete(run.checkpoints)
    if not run.summary.is_file() or newest is None:
        raise ValueError(f"{run.root} has not finished, so there is no result to publish; resume it first")
    verify_checkpoint(newest)
    folder = run.root / "hub"
    if folder.is_symlink():  # nothing is written through a link
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    policy, config = evaluated_policy(newest), load_config(run.config)
    if model_family(config.model.kind).card.pipelines:
        export(newest, folder, ExportOptions(ema=policy != newest / "policy", base=base))
    else:
        if base is not None:
            raise ValueError(
                f"--base {base} is for models with a diffusers pipeline, and model.kind={config.model.kind} has none; "
                "leave --base out"
            )
        for file in sorted(item for item in policy.rglob("*") if item.is_file()):
            target = folder / file.relative_to(policy)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
    if (folder / _ADAPTER).is_file():
        _hide_base(folder / _ADAPTER)
    text = card(run, config, repo, int(newest.name.rpartition("_")[2]))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def _hide_base(file: Path) -> None:
    """Replace the local path of an adapter's base by the name of its folder; the file must not change elsewhere."""
    fields = read_json(file)
    base = fields.get("base_model_name_or_path")
    fields["base_model_name_or_path"] = Path(base).name if base else None
    file.unlink()
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a repository, which is made if it is not there, and return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.whoami()
        address = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ValueError(
                f"{repo} exists already and is public, although --private is given; make it private on the Hub, or "
                "choose another name"
            )
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Policy and card of a vpo-engine run"
        )
    except LocalTokenNotFoundError as error:
        raise ValueError("you are not logged in to the Hub; run hf auth login, or set HF_TOKEN") from error
    except HTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the Hub refuses {repo} or cannot be reached ({reason}); the folder is kept in {folder}"
        ) from error
    return str(address)


if __name__ == "__main__":
    sys.exit(main())
