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
from typing import Any

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
    for file in sorted(folder.rglob("*.json")):
        _hide_paths(file)
    text = card(run, config, repo, int(newest.name.rpartition("_")[2]))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def _hide_paths(file: Path) -> None:
    """Replace the folders that libraries note what they loaded from by their names; the file must not change elsewhere.

    These are an adapter's base, and what diffusers and transformers write into the settings that they save.
    """
    if b"name_or_path" not in file.read_bytes():
        return
    fields = read_json(file)
    local = {name: value for name, value in fields.items() if _is_folder(name, value)}
    if local:
        file.unlink()  # it may be a hard link to the base's
        shown = {name: Path(value).name for name, value in local.items()}
        file.write_text(json.dumps(fields | shown, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_folder(name: str, value: Any) -> bool:
    """Return whether a setting is the local path that something was loaded from; names of the Hub are none."""
    if not name.endswith("name_or_path") or not isinstance(value, str) or not value:
        return False
    return name == "base_model_name_or_path" or Path(value).is_absolute()


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
