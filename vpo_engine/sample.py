"""Sample videos from a policy and write them as mp4 files, with their prompts beside them.

    python -m vpo_engine.sample RUN --prompt "a red circle moving left" --out clips

RUN is one of:
  a run directory     its newest checkpoint is used
  a checkpoint        a folder RUN_DIRECTORY/checkpoints/step_...
  a YAML file         a configuration; the policy that such a run starts from is used
  nothing             the sprites policy that is part of the package
Sampling steps, guidance and video size are those of the run's configuration. Without a prompt, the sprites world's
held-out captions are sampled. A checkpoint is compared with its hashes before it is used.

The prompts stand in FOLDER/prompts.jsonl, which vpo_engine.rank reads. Several calls may write into one folder.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vpo_engine.command import report_errors
from vpo_engine.data.clips import PromptRecord
from vpo_engine.data.prompts import PromptFile, PromptList

if TYPE_CHECKING:  # torch is imported when everything that the arguments alone tell has been said
    from vpo_engine.config import Config

_WORDS_IN_NAME = 60
"""Characters of a prompt in the name of a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if len(given.run) > 1:
        parser.error(
            f"give one RUN, got {len(given.run)}: {', '.join(given.run)}; call sample for each of them"
        )
    if given.column is not None and given.prompts is None:
        parser.error("--column names a column of --prompts FILE; give that too, or leave it out")

    def run() -> None:
        prompts = _prompts(given.prompt, given.prompts, given.column)
        source = Path(given.run[0]) if given.run else None
        sample(source, prompts, given.out, given.count, given.seed)

    return report_errors(run, "stopped; the videos listed above are complete")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="*", metavar="RUN", help="what to sample from, see above")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt; repeat the option for several",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts, as for training")
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="the column, or the key, of FILE that holds the prompts; by default the usual names are tried",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="FOLDER",
        help="folder for the mp4 files (default: %(default)s)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="number of videos for each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the starting noise (default: %(default)s)"
    )
    return parser


def sample(run: Path | None, prompts: Sequence[str], out: Path, count: int, seed: int) -> list[Path]:
    """Write ``count`` videos for each prompt to ``out``; return the files, in the order of the prompts."""
    if count < 1:
        raise ValueError(f"--count {count} is too small; give at least 1 video for each prompt")
    config, adapter = _config_of(run)
    if not prompts and config.model.kind == "sprites":
        from vpo_engine.data.sprites.world import withheld_captions

        prompts = withheld_captions()
    if not prompts:
        raise ValueError(
            "there is no prompt; give one with --prompt TEXT, or a file of them with --prompts FILE"
        )
    from vpo_engine.build import check_prompts

    for note in check_prompts(config, prompts):
        print(note, file=sys.stderr)
    record = PromptRecord(out)
    names = [[_name(number, prompt, copy) for copy in range(count)] for number, prompt in enumerate(prompts)]
    files = []
    for name, prompt, write in _sampled(config, adapter, prompts, names, seed, record):
        files.append(record.add(name, prompt, write))
        print(files[-1], flush=True)
    print(
        f"{len(files)} videos and their prompts ({record.path.name}) are in {out}; open {files[0]}, or score them: "
        f"python -m vpo_engine.rank {out} --reward builtin"
    )
    return files


def _sampled(
    config: Config,
    adapter: Path | None,
    prompts: Sequence[str],
    names: Sequence[Sequence[str]],
    seed: int,
    record: PromptRecord,
) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Load the model and sample. Yield name and prompt of each video, and a function that writes it to a path."""
    import torch

    from vpo_engine.build import build_model
    from vpo_engine.distributed.processes import Processes
    from vpo_engine.models.lora import load_adapter
    from vpo_engine.runs.video import write_mp4
    from vpo_engine.seeding import normal

    processes = Processes.start(config.model.device)
    model = build_model(config, processes)
    if adapter is not None:
        load_adapter(model.network, adapter)
    model.prepare(prompts)
    record.begin([name for copies in names for name in copies])
    settings = config.rollout
    for number, (prompt, copies) in enumerate(zip(prompts, names, strict=True)):
        with torch.no_grad():
            noise = torch.stack(
                [normal(model.latent_shape, seed, "sample", number, copy) for copy in range(len(copies))]
            ).to(processes.device)
            text = model.embed([prompt]).repeat_interleave(len(copies))
            with model.idle_offload.phase("evaluation"):
                latents = model.sample(
                    model.network, noise, text, steps=settings.steps, guidance=settings.guidance
                )
            videos = model.decode(latents).cpu()
        for name, video in zip(copies, videos, strict=True):
            yield name, prompt, partial(write_mp4, frames=video, fps=model.fps)


def _config_of(run: Path | None) -> tuple[Config, Path | None]:
    """Load the configuration of a run or checkpoint, with model.policy set to the weights that the run evaluated.

    A run with model.lora has trained an adapter only. Then model.policy stays as it is, and the adapter's folder is
    returned beside the configuration; otherwise that is None. Raise ValueError for a path where nothing is, and for a
    checkpoint that is not as it was saved.
    """
    if run is not None and not run.exists() and run.suffix not in (".yaml", ".yml"):
        raise ValueError(f"there is no run, checkpoint or YAML file at {run}; {_nearest(run)}")
    from vpo_engine.config_file import load_config

    if run is None or not run.is_dir():
        return load_config(run), None
    from vpo_engine.runs.checkpoint import evaluated_policy, verify_checkpoint
    from vpo_engine.runs.directory import RunDirectory

    checkpoint = run if (run / "policy").is_dir() else _newest_checkpoint(run)
    verify_checkpoint(checkpoint)
    root = checkpoint.resolve().parent.parent
    saved, trained = RunDirectory.open(root).config, evaluated_policy(checkpoint)
    config = load_config(saved, [f"run_dir={root}"])
    if config.model.lora is not None:
        return config, trained
    return load_config(saved, [f"run_dir={root}", f"model.policy={trained}"]), None


def _newest_checkpoint(run: Path) -> Path:
    """Return the newest complete checkpoint of a run directory."""
    from vpo_engine.runs.checkpoint import newest_complete
    from vpo_engine.runs.directory import CONFIG_NAME, RunDirectory

    runs = sorted(path.parent for path in run.glob(f"*/{CONFIG_NAME}") if not path.parent.is_symlink())
    if runs and not (run / CONFIG_NAME).is_file():
        raise ValueError(f"{run} holds {len(runs)} runs; give one of them, such as {runs[-1]}")
    newest = newest_complete(RunDirectory.open(run).checkpoints)
    if newest is None:
        raise ValueError(
            f"{run} has no complete checkpoint yet; wait until the run has saved one, or give a YAML configuration"
        )
    return newest


def _nearest(run: Path) -> str:
    """Return what to do about a path where nothing is."""
    around = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
    near = difflib.get_close_matches(run.name, around, n=1)
    return f"did you mean {run.parent / near[0]}?" if near else f"check the path (relative to {Path.cwd()})"


def _prompts(texts: Sequence[str], file: Path | None, column: str | None) -> list[str]:
    """Return the prompts of the command line and of a file. Raise ValueError for one that is no text."""
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError(f"--prompt number {number} is {text!r}; give it words, or leave it out")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"--prompt number {number} is {text!r}, which is not UTF-8; write it as UTF-8")
    given = [text.strip() for text in texts]
    if file is None:
        return given
    if column is not None and file.suffix.lower() == ".txt":
        raise ValueError(
            f"--column {column}: {file} has no columns, as a .txt holds a prompt a line; leave it out"
        )
    return PromptList(given, PromptFile(file, column, choose="set --column"))


def _name(number: int, prompt: str, copy: int) -> str:
    """Return the name of a video's file: number, words of the prompt, copy.

    Where the words are not the whole prompt, a few digits of its hash make the name another one than that of other
    prompts with these words.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_WORDS_IN_NAME].strip("-") or "prompt"
    if words.replace("-", " ") != prompt:
        words += f"-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{number:04d}-{words}-{copy}.mp4"


if __name__ == "__main__":
    sys.exit(main())
