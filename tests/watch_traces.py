"""Record the runs that ``tests/metrics/test_step_watch.py`` replays: honest ones, and ones with a planted fault.

python tests/watch_traces.py NAME FOLDER

runs the sprites world and writes FOLDER/NAME.json: the rows of its log that the watch reads. A fault is planted before
step ``PLANTED``; until then the run is an honest one. Of ``rate`` 20 steps were recorded, of candidates that were
sampled in 8 steps, and only what the loss logs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from vpo_engine.metrics.candidate_statistics import WATCHED, video_statistics
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.rewards import guards
from vpo_engine.runs.log import read_metrics
from vpo_engine.selection import Selector
from vpo_engine.train import main
from vpo_engine.values import Prompt

PLANTED = 9
QUIET = ("evaluation.prompts=2", "evaluation.samples_per_prompt=1", "evaluation.every=null")
SHORT = (
    "configs/sprites.yaml",
    "steps=16",
    "pairs_per_step=8",
    "rollout.steps=5",
    "objective.timesteps_per_pair=2",
    "optimizer.final_lr=1.0",
    "guards.motion_floor=1e-9",
    "guards.style_bound=null",
    *QUIET,
)


HONEST = {f"honest_{seed}": (*SHORT, f"seed={seed}") for seed in (1, 2, 3)}


def higher_rate(factor: float) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        begin = method.optimizer.begin
        method.optimizer.begin = lambda rate: begin(rate * factor)  # type: ignore[method-assign]

    return plant


def higher_beta(factor: float) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        config = method.objective._config
        method.objective._config = config.model_copy(update={"beta": config.beta * factor})

    return plant


def choose_by(score: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        Selector.scalar = lambda self, scores: score(scores)  # type: ignore[method-assign, assignment]

    return plant


def all_of(*plants: Callable[[OnlineVPO], None]) -> Callable[[OnlineVPO], None]:
    def plant(method: OnlineVPO) -> None:
        for each in plants:
            each(method)

    return plant


FAULTS: dict[str, tuple[Callable[[OnlineVPO], None], str]] = {
    # name: what is planted, and the statistic that the extra score "motion" holds
    "beta": (higher_beta(100), "motion"),
    "rate": (higher_rate(20), "motion"),
    "bold": (all_of(higher_rate(4), higher_beta(0.1)), "motion"),
    "offline": (higher_rate(4), "motion"),
    "still": (all_of(higher_rate(4), choose_by(lambda scores: -scores["motion"])), "motion"),
    "colour": (all_of(higher_rate(4), choose_by(lambda scores: scores["motion"])), "saturation"),
    "blind": (
        all_of(higher_rate(4), choose_by(lambda scores: scores["visual_quality"] - scores["text_alignment"])),
        "motion",
    ),
}


OWN = {
    "bold": ("reference.refresh_every=null",),
    "offline": ("reference.refresh_every=null", "rollout.source=reference"),
}
"""Settings of single runs."""


def run(name: str, folder: Path) -> None:
    if name in FAULTS:
        plant, statistic = FAULTS[name]
        place = WATCHED.index(statistic)
        guards.motion = lambda videos: video_statistics(videos)[:, place].cpu()  # type: ignore[assignment]
        step = OnlineVPO.step

        def planted(self: OnlineVPO, prompts: Sequence[Prompt]) -> Any:
            if prompts[0].position == (PLANTED - 1) * self.config.pairs_per_step:
                plant(self)
            return step(self, prompts)

        OnlineVPO.step = planted  # type: ignore[method-assign]
    with TemporaryDirectory() as made:
        own = OWN.get(name, ())
        assert main([*HONEST.get(name, SHORT), *own, f"run_dir={made}/run"]) == 0
        rows = read_metrics(Path(made) / "run/metrics.jsonl")
    write([row for row in rows if row["kind"] == "train" or row["step"] == 0], folder / f"{name}.json")


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write what the watch reads of these rows, one row a line, with five digits."""
    left_out = ("seconds/", "speed/", "reference/", "memory/", "held_out/")
    kept = [
        {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in row.items()
            if not key.startswith(left_out)
        }
        for row in rows
    ]
    lines = ",\n".join(json.dumps(row) for row in kept)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
