"""Tables like the paper's 4a and 4b on the sprites world: one run of the default for each reward, and its effect.

Every run starts from the same policy with the same seed, and differs in ``reward.kind`` or ``reward.dimensions`` only.
The effect is measured on the held-out clips of the run (the same prompts and noise) by the judge, by pixel measures and
by the image scorer, whichever reward the run was trained with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vpo_engine.build import build_model, build_prompts
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.measure import measure
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.metrics.summary import summarise
from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.sprites import SpritesJudge
from vpo_engine.rewards.sprites_image import SpritesImage
from vpo_engine.runs.checkpoint import newest_complete
from vpo_engine.runs.directory import RunDirectory


@dataclass(frozen=True)
class Row:
    """A row of a table: the run that it shows, and the corresponding row of the paper."""

    label: str
    run: str
    paper: tuple[float, float, float] | None
    """VBench's dynamic degree, subject consistency and aesthetic quality, per cent; None if the paper has no row."""


RUNS: dict[str, tuple[str, ...]] = {
    "brisque": ("reward.kind=brisque", "reward.dimensions=[visual_quality]"),
    "image": ("reward.kind=sprites_image", "reward.dimensions=[global]"),
    "visual_quality": ("reward.dimensions=[visual_quality]",),
    "dynamic_degree": ("reward.dimensions=[dynamic_degree]",),
    "text_alignment": ("reward.dimensions=[text_alignment]",),
    "temporal_consistency": ("reward.dimensions=[temporal_consistency]",),
    "factual_consistency": ("reward.dimensions=[factual_consistency]",),
    "global": ("reward.dimensions=[global]",),
}
"""{name: settings in addition to those of configs/sprites.yaml}"""
_TEMPORAL = (43.0, 97.58, 55.37)
TABLES: dict[str, tuple[Row, ...]] = {
    "4a": (
        Row("BRISQUE (builtin), for aesthetic", "brisque", (40.1, 95.04, 52.33)),
        Row("sprites_image, for ImageReward", "image", (46.0, 96.26, 51.04)),
        Row("sprites, temporal consistency, for VideoScore", "temporal_consistency", _TEMPORAL),
        Row("sprites, mean of all, the engine's default", "global", None),
    ),
    "4b": (
        Row("visual quality", "visual_quality", (38.0, 96.56, 52.97)),
        Row("dynamic degree", "dynamic_degree", (57.0, 92.09, 49.02)),
        Row("alignment", "text_alignment", (44.0, 96.19, 50.52)),
        Row("temporal consistency", "temporal_consistency", _TEMPORAL),
        Row("factual consistency", "factual_consistency", None),
        Row("global", "global", (55.0, 95.37, 51.33)),
    ),
}


def command(name: str, out: Path, seed: int, steps: int | None) -> list[str]:
    """Return the arguments of ``python`` that start or resume a run of RUNS in ``out``/NAME."""
    overrides = [f"name={name}", f"run_dir={out / name}", f"seed={seed}", "model.device=cpu", *RUNS[name]]
    if steps is not None:
        overrides += [f"steps={steps}", f"optimizer.warmup_steps={steps // 8}"]
    return ["-m", "vpo_engine.train", *overrides]


def train(names: Sequence[str], out: Path, seed: int, steps: int | None, jobs: int) -> None:
    """Do the runs in ``out``, ``jobs`` at a time, each in a process of one thread; output goes to ``out``/NAME.log.

    A finished run is not repeated, and an unfinished one is resumed. ValueError, after all have ended, naming those
    that failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (out / name / "summary.json").is_file()]
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(lambda name: _train_one(name, command(name, out, seed, steps), out), missing))
    failed = [name for name, code in zip(missing, codes, strict=True) if code]
    if failed:
        last = (
            (out / f"{failed[0]}.log").read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
        )
        raise ValueError(f"training failed for {', '.join(failed)}; {out / failed[0]}.log ends with: {last}")


def _train_one(name: str, arguments: Sequence[str], out: Path) -> int:
    print(f"training {name}: python {' '.join(arguments)}", flush=True)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        ran = subprocess.run(
            [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads}
        )
    return ran.returncode


def look(run: RunDirectory, policy: Path | None) -> dict[str, Tensor]:
    """Measure the run's held-out clips, [clips] each, by a saved policy (None: the policy from which it started)."""
    overrides = ["reward.dimensions=[global]", *([] if policy is None else [f"model.policy={policy}"])]
    config = load_config(run.config, overrides)
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    _, prompts = build_prompts(config)
    model.prepare(prompts)
    scorers = HeldOutScorers(VideoOfFrames(SpritesImage()), measure, SpritesJudge())
    held_out = HeldOut(config, model, prompts, scorers, processes)
    return held_out.evaluate(model.network, config.evaluation.samples_per_prompt)


def measured(names: Sequence[str], out: Path, origin: str) -> dict[str, dict[str, Any]]:
    """Measure the effect of finished runs: {name: summary with ``origin``}; kept in ``out``/NAME/measures.json.

    For every run ``reward/image`` is the image scorer's score, and ``judge/selected`` the judge's mean of all
    dimensions. The judge's and the pixel measures must equal those of the run's summary.json, since the clips are the
    same; this is checked.
    """
    found, base = {}, None
    for name in names:
        run = RunDirectory.open(out / name)
        path = run.root / "measures.json"
        if not path.is_file():
            newest = newest_complete(run.checkpoints)
            assert newest is not None, run.root
            base = base or look(run, None)
            print(f"measuring {name}", flush=True)
            summary = summarise(base, look(run, newest / "policy"), {})
            _check_same_clips(json.loads(run.summary.read_text(encoding="utf-8")), summary, run.root)
            path.write_text(json.dumps(summary | {"origin": origin}, indent=1), encoding="utf-8")
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _check_same_clips(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> None:
    for name, numbers in theirs["measures"].items():
        if name.startswith(("judge/", "pixels/")) and not name.endswith("/selected"):
            for when in ("before", "after"):
                here = ours["measures"][name][when]
                if abs(here - numbers[when]) > 0.01 * max(1.0, abs(here)):
                    raise ValueError(
                        f"{where}: {name} {when} training is {here:.4f}, its summary.json says {numbers[when]:.4f}; "
                        "was the run made by another version? Remove it and start again"
                    )
