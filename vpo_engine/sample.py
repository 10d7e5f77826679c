"""Sample videos from a policy and write them as mp4 files.

    python -m vpo_engine.sample RUN --prompt "a red circle moving left" --out clips

RUN is a run directory (its newest checkpoint is taken), a checkpoint in it, or a YAML configuration (the policy that
it starts from). Without RUN: the shipped sprites policy. Steps, guidance and size are the run's own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.prompts import PromptFile
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
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN")
    parser.add_argument("--prompt", action="append", default=[], help="a text; may be given several times")
    parser.add_argument("--prompts", type=Path, help="a .txt, .csv or .jsonl file of prompts")
    parser.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder for the files (%(default)s)"
    )
    parser.add_argument("--count", type=int, default=1, help="videos per prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        sample(given.run, _prompts(given.prompt, given.prompts), given.out, given.count, given.seed)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def sample(run: Path | None, prompts: Sequence[str], out: Path, count: int, seed: int) -> list[Path]:
    """Write ``count`` videos per prompt to ``out``; the files, in order of prompts."""
    if count < 1:
        raise ValueError(f"--count {count} must be at least 1")
    config, adapter = _config_of(run)
    prompts = prompts or (withheld_captions() if config.model.kind == "sprites" else [])
    if not prompts:
        raise ValueError("no prompt given; use --prompt TEXT or --prompts FILE")
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
        with model.residency.phase("evaluation"):
            latents = model.sample(
                model.network, noise, text, steps=settings.steps, guidance=settings.guidance
            )
        for copy, video in enumerate(model.decode(latents).cpu()):
            files.append(out / f"{number:04d}-{_slug(prompt)}-{copy}.mp4")
            write_mp4(files[-1], video, model.fps)
            print(files[-1], flush=True)
    return files


def _config_of(run: Path | None) -> tuple[Config, Path | None]:
    """The configuration of a run or checkpoint, with model.policy set to the trained weights.

    A run with model.lora has trained an adapter only: its folder, to be loaded on top of the run's own model.policy.
    """
    if run is None or run.is_file() or not run.exists():
        return load_config(run), None
    checkpoint = run
    if not (run / "policy").is_dir():
        newest = newest_complete(RunDirectory.open(run).checkpoints)
        if newest is None:
            raise ValueError(f"{run} holds no complete checkpoint yet; wait for one, or give a configuration")
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
    rows = PromptFile(file)
    return [*texts, *(rows[index] for index in range(len(rows)))]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


if __name__ == "__main__":
    sys.exit(main())
