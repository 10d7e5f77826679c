"""Cells that a small script makes in place of training: run directories, results, failures and waiting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vpo_engine.reproducing.cells import RESULT, RUN, Cell
from vpo_engine.reproducing.runner import Commands

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
NAMES = (
    *(f"judge/{name}" for name in (*DIMENSIONS, "mean", "frechet", "moving_quality")),
    "reward/mean",
    "reward/image",
    *(f"pixels/{name}" for name in ("jitter", "colour_change", "flicker", "displacement")),
)
"""All measures that tables show."""
CLIPS = 4
TINY = (
    "steps=2",
    "pairs_per_step=2",
    "rollout.candidates=2",
    "rollout.steps=2",
    "objective.timesteps_per_pair=1",
    "evaluation.prompts=2",
    "evaluation.samples_per_prompt=2",
    "evaluation.every=null",
)
"""Settings of a real run that takes a few seconds."""

_TRAIN = """
import json, pathlib, sys
run, curve = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text("name: fake")
with (run / "metrics.jsonl").open("w") as file:
    for step, (reward, judge) in enumerate(curve):
        row = {"step": step, "held_out/reward/selected": reward, "held_out/judge/selected": judge}
        row |= {"held_out/pixels/jitter": 0.3, "held_out/pixels/displacement": 8.0}
        file.write(json.dumps({"kind": "eval", **row}) + "\\n")
        if step:
            file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
(run / "summary.json").write_text(json.dumps({"clips": 1, "measures": {}, "timings": {"rollout": 1.0, "step": 3.0}}))
(run / "alarms.jsonl").write_text("".join(json.dumps(each) + "\\n" for each in json.loads(sys.argv[3])))
"""
_MEASURE = """
import pathlib, sys
pathlib.Path(sys.argv[1]).write_text(sys.argv[2])
"""


class FakeCells:
    """Makes cells whose numbers are ``values`` of the cell, by measure, and ``base`` elsewhere.

    made: the cells that were begun, in order. scripts: programs in place of the trainer, by a word of the settings.
    """

    def __init__(self, values: Mapping[str, Mapping[str, float]] = {}, base: float = 2.0) -> None:
        self.values, self.base = values, base
        self.made: list[Cell] = []
        self.scripts: dict[str, str] = {}
        self.curve = [[3.0, 3.0], [3.5, 3.4], [3.6, 3.5]]
        self.alarms: list[dict[str, object]] = []

    def __call__(self, cell: Cell, folder: Path) -> Commands:
        self.made.append(cell)
        measure = ["-c", _MEASURE, str(folder / RESULT), json.dumps({"clips": self.clips(cell)})]
        if cell.kind == "base":
            return {"measuring": measure}
        train = ["-c", _TRAIN, str(folder / RUN), json.dumps(self.curve), json.dumps(self.alarms)]
        for word, script in self.scripts.items():
            if word in cell.settings:
                train = ["-c", script, str(folder)]
        return {"train": train, "measure": measure}

    def clips(self, cell: Cell) -> dict[str, list[float]]:
        """Return the numbers of a cell: those of the base policy, and what its settings add, on CLIPS clips."""
        added = {}
        for word, values in self.values.items():
            if cell.kind == "run" and (word in cell.settings or (word == "" and not cell.settings)):
                added |= values
        scatter = [0.01 * (clip + 1) for clip in range(CLIPS)]
        return {
            name: [self.base + cell.seed * 0.1 + added.get(name, 0.0) * (1 + each) for each in scatter]
            for name in NAMES
        }
