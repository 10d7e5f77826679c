"""Divergence that no single evaluation shows: by whose spread a fall counts, and that a resume changes nothing."""

from __future__ import annotations

import json

from test_reward_monitor import evaluation
from torch import Tensor

from vpo_engine.config import GuardsConfig
from vpo_engine.metrics.reward_monitor import RewardMonitor


def noisy(training: float, held_out: float) -> dict[str, Tensor]:
    """Return clips about these means that vary by far more than the means do."""
    found = evaluation(2.0, 3.0, spread=4.0)
    for name, mean in (("reward/selected", training), ("judge/selected", held_out)):
        found[name] = found[name] - found[name].mean() + mean
    return found


def test_a_fall_counts_by_the_spread_of_the_held_out_reward() -> None:
    """The training reward may be on another scale, here of a hundred times the size."""
    monitor, base = RewardMonitor(GuardsConfig(window=4), 12), evaluation(2.0, 3.0)
    base["reward/selected"] = 100 * base["reward/selected"]
    said = []
    for step in range(4):
        now = noisy(2.5 + 0.1 * step, 2.5 - 0.1 * step)
        now["reward/selected"] = 100 * now["reward/selected"]
        said += monitor.observe(step, base, now)[1]
    assert [(alarm.step, alarm.kind) for alarm in said] == [(3, "divergence")]


def test_after_a_resume_a_fall_that_was_too_small_does_not_hide_a_later_one() -> None:
    base, falls = evaluation(2.0, 3.0), (0.0, 0.001, 0.002, 0.003, 0.1, 0.2)
    nows = [noisy(2.5 + 0.02 * step, 2.5 - fall) for step, fall in enumerate(falls)]
    whole = RewardMonitor(GuardsConfig(window=4), 12)
    expected = [whole.observe(step, base, now)[1] for step, now in enumerate(nows)]
    assert [alarm.step for alarms in expected for alarm in alarms] == [5]
    for cut in (4, 5):
        first, second = (RewardMonitor(GuardsConfig(window=4), 12) for _ in range(2))
        for step in range(cut):
            first.observe(step, base, nows[step])
        second.load(json.loads(json.dumps(first.state())))
        assert [second.observe(step, base, nows[step])[1] for step in range(cut, 6)] == expected[cut:]
