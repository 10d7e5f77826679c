"""Replay logs of runs that went wrong, and of honest ones, and see which alarms the watch raises and when."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vpo_engine.config_file import load_config
from vpo_engine.metrics.reward_monitor import RewardMonitor
from vpo_engine.metrics.step_watch import Alarm, StepWatch
from vpo_engine.rewards.guards import Shuffled

DATA = Path(__file__).parents[1] / "data/watch"
SOON = 5
"""An alarm comes within so many rollouts of the onset."""
Row = dict[str, Any]
Alarms = list[Alarm]


def monitor_of(rows: Sequence[Row]) -> RewardMonitor:
    """Return the monitor of a run that begins with these rows; its check of prompts is in the first one."""
    config = load_config(None, [])
    monitor = RewardMonitor(config.guards, 2, StepWatch(config))
    shares = {k.removeprefix("guards/prompt/"): v for k, v in rows[0].items() if k.startswith("guards/prompt/")}
    if shares:
        monitor.prompts({name: Shuffled(round(16 * share), 0, 16) for name, share in shares.items()})
    return monitor


def replay(rows: Sequence[Row]) -> Alarms:
    monitor = monitor_of(rows)
    return [alarm for row in rows if row["kind"] == "train" for alarm in monitor.step(row["step"], row)[1]]


def recorded(name: str) -> list[Row]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


class Synthetic:
    """Rows of an honest run whose statistics are drawn about constant means."""

    def __init__(self, seed: int = 0, noise: float = 1.0) -> None:
        self._random, self._noise = random.Random(seed), noise

    def _about(self, mean: float, error: float) -> float:
        return self._random.gauss(mean, self._noise * error)

    def row(self, step: int, **changes: float) -> Row:
        """Return the row of a step. ``changes``: what is added to its numbers, with _ for /."""
        pairs, age = 16, (step - 1) % 10
        row: Row = {"step": step, "kind": "train", "pairs": pairs}
        looks = {"brightness": (60, 10), "contrast": (25, 10), "saturation": (13, 4), "sharpness": (5, 2), "motion": (1.3, 0.3)}
        for name, (mean, deviation) in looks.items():
            error = deviation / math.sqrt(2 * pairs)
            row |= {f"watch/{name}": self._about(mean, error), f"watch/sd/{name}": deviation, f"watch/se/{name}": error}
        row |= {"watch/prompt_share": self._about(0.4, 0.06), "watch/se/prompt_share": 0.08}
        for name, mean in {"blind": 0.02, "reading": 0.11}.items():
            row |= {f"reward/{name}": self._about(mean, 0.01), f"watch/sd/reward/{name}": 0.05, f"watch/se/reward/{name}": 0.01}
        scale = 0.15
        row["saturated"] = sum(self._random.random() < 0.01 * age for _ in range(pairs)) / pairs
        row |= {"reference_winner_error": scale, "reference_loser_error": scale}
        row |= {"winner_error_change": self._about(0.0, 0.001) if age else 0.0, "watch/se/winner_error_change": 0.001 * (age > 0)}
        row["loser_error_change"] = row["winner_error_change"] + 0.0003 * age
        for name, change in changes.items():
            row[name] += change
        return row


def synthetic(onset: int, steps: int, **slopes: Any) -> list[Row]:
    """Return rows whose numbers are changed from ``onset`` on by functions of the steps since then."""
    source = Synthetic()
    rows: list[Row] = [{"step": 0, "kind": "eval", "guards/prompt/blind": 0.0, "guards/prompt/reading": 1.0}]
    for step in range(1, steps + 1):
        since = step - onset + 1
        rows.append(source.row(step, **{name: change(since) for name, change in slopes.items() if since > 0}))
    return rows


@pytest.mark.parametrize("name", ["honest_0", "honest_1", "honest_2"])
def test_honest_runs_raise_no_alarm(name: str) -> None:
    assert replay(recorded(name)) == []


@pytest.mark.parametrize("seed", range(2))
def test_an_honest_run_of_ten_thousand_steps_raises_no_alarm(seed: int) -> None:
    source = Synthetic(seed)
    head: Row = {"step": 0, "kind": "eval", "guards/prompt/blind": 0.0, "guards/prompt/reading": 1.0}
    monitor = monitor_of([head])
    for step in range(1, 10_001):
        assert monitor.step(step, source.row(step))[1] == []
