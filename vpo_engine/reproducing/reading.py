"""Read what finished cells hold: clips, curves, alarms, and what a run took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_engine.config import Config
from vpo_engine.config_file import parse_config
from vpo_engine.reproducing.cells import RESULT, RUN, Cell, Record, read_result
from vpo_engine.runs.alarms import read_alarms
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.log import read_metrics
from vpo_engine.runs.readable import readable
from vpo_engine.runs.summary_file import read_summary

_OF_SAMPLING = (
    "evaluation.samples_per_prompt",
    "evaluation.prompts",
    "evaluation.steps",
    "model.",
    "prompts.",
    "rollout.steps",
    "rollout.guidance",
)
"""Beginnings of the settings on which the clips of the base policy depend."""
_NOT_TRAINING = ("text", "evaluate", "checkpoint", "step")
"""Entries of a run's timings that are no stage of its steps."""


@dataclass(frozen=True)
class Ran:
    """The costs and the results of a finished run.

    training_seconds: processor seconds of its steps, without start, evaluations and checkpoints. videos: how many
    videos the reward scored in training. alarms: of the guards. curve: the rows that evaluations logged.
    """

    record: Record
    clips: Mapping[str, list[float]]
    training_seconds: float
    videos: int
    alarms: list[dict[str, Any]]
    curve: list[dict[str, Any]]


def base_cell(cell: Cell) -> Cell:
    """Return the cell that measures the policy from which the run of ``cell`` starts, on the same clips."""
    shared = tuple(word for word in cell.settings if word.startswith(_OF_SAMPLING))
    return Cell("base", shared, cell.seed, cell.source)


def read_run(folder: Path) -> Ran:
    """Read a finished run's cell."""
    record = Record.read(folder)
    assert record is not None, folder
    assert record.finished, folder
    run = RunDirectory.open(folder / RUN)
    rows = read_metrics(run.metrics)
    timings = read_summary(run.summary)["timings"]
    stages = sum(value for name, value in timings.items() if name not in _NOT_TRAINING)
    processor, clock = record.took("train")
    return Ran(
        record,
        base_clips(folder),
        processor * min(1.0, stages / max(clock, 1e-9)),
        videos_scored(parse_config(record.resolved, str(folder)), rows),
        read_alarms(run) or [],
        [row for row in rows if row["kind"] == "eval"],
    )


def videos_scored(config: Config, rows: list[dict[str, Any]]) -> int:
    """Return how many videos the reward scored for the steps that a run logged."""
    steps = sum(row["kind"] == "train" for row in rows)
    of_prompt = 1 if config.card.reward_gradient else config.rollout.candidates
    return steps * config.pairs_per_step * of_prompt


def base_clips(folder: Path) -> Mapping[str, list[float]]:
    """Read the clips of a finished cell of a policy. ValueError if they are not as they were written."""
    with readable(folder / RESULT, f"remove {folder}, and its cell is made again"):
        clips: dict[str, list[float]] = read_result(folder)["clips"]
        if len({len(values) for values in clips.values()}) > 1:
            raise ValueError("measures have different numbers of clips")
        for name, values in clips.items():
            if any(type(value) not in (int, float) for value in values):
                raise TypeError(f"a value of {name} is no number")
    return clips
