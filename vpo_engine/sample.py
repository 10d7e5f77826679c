"""Sample videos from a policy and write them as mp4 files.

    python -m vpo_engine.sample RUN --prompt "a red circle moving left" --out clips

RUN is one of:
  a run directory     its newest checkpoint is used
  a checkpoint        a folder RUN_DIRECTORY/checkpoints/step_...
  a YAML file         a configuration; the policy that such a run starts from is used
  nothing             the sprites policy that is part of the package
Sampling steps, guidance and video size are those of the run's configuration. Without a prompt, the sprites world's
held-out captions are sampled.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vpo_engine.build import build_model, check_prompts
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.prompts import PromptFile, PromptList
from vpo_engine.data.sprites.world import withheld_captions
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.lora import load_adapter
from vpo_engine.runs.checkpoint import newest_complete
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.video import write_mp4
from vpo_engine.seeding import normal


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="what to sample from, see above")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt; repeat the option for several",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts from a .txt, .csv or .jsonl file"
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
    given = parser.parse_args(arguments)
    try:
        sample(given.run, _prompts(given.prompt, given.prompts), given.out, given.count, given.seed)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def sample(run: Path | None, prompts: Sequence[str], out: Path, count: int, seed: int) -> list[Path]:
    """Write ``count`` videos for each prompt to ``out``; return the files, in the order of the prompts."""
    if count < 1:
        raise ValueError(f"--count {count} is too small; give at least 1 video for each prompt")
    config, adapter = _config_of(run)
    prompts = prompts or (withheld_captions() if config.model.kind == "sprites" else [])
    if not prompts:
        raise ValueError(
            "there is no prompt; give one with --prompt TEXT, or a file of them with --prompts FILE"
        )
    for note in check_prompts(config, prompts):
        print(note, file=sys.stderr)
    processes = Processes.start(config.model.device)
    model = build_model(config, processes)
    if adapter is not None:
        load_adapter(model.network, adapter)
    model.prepare(prompts)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for number, prompt in enumerate(prompts):
        noise = torch.stack(
            [normal(model.latent_shape, seed, "sample", number, copy) for copy in range(count)]
        ).to(processes.device)
        text = model.embed([prompt]).repeat_interleave(count)
        settings = config.rollout
        with model.idle_offload.phase("evaluation"):
            latents = model.sample(
                model.network, noise, text, steps=settings.steps, guidance=settings.guidance
            )
        for copy, video in enumerate(model.decode(latents).cpu()):
            files.append(out / f"{number:04d}-{_slug(prompt)}-{copy}.mp4")
            write_mp4(files[-1], video, model.fps)
            print(files[-1], flush=True)
    return files


def _config_of(run: Path | None) -> tuple[Config, Path | None]:
    """Load the configuration of a run or checkpoint, with model.policy set to the trained weights.

    A run with model.lora has trained an adapter only. Then model.policy stays as it is, and the adapter's folder is
    returned beside the configuration; otherwise that is None.
    """
    if run is None or run.is_file() or not run.exists():
        return load_config(run), None
    checkpoint = run
    if not (run / "policy").is_dir():
        newest = newest_complete(RunDirectory.open(run).checkpoints)
        if newest is None:
            raise ValueError(
                f"{run} has no complete checkpoint yet; wait until the run has saved one, or give a YAML configuration"
            )
        checkpoint = newest
    root = checkpoint.resolve().parent.parent
    saved, trained = RunDirectory.open(root).config, checkpoint / "policy"
    config = load_config(saved, [f"run_dir={root}"])
    if config.model.lora is not None:
        return config, trained
    return load_config(saved, [f"run_dir={root}", f"model.policy={trained}"]), None


def _prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    if file is None:
        return list(texts)
    return PromptList(texts, PromptFile(file))


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


if __name__ == "__main__":
    sys.exit(main())
