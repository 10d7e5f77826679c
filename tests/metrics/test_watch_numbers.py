"""The numbers of the watch: the least unit of a look, the floor that it advises, and what it says is tolerated."""

from __future__ import annotations

import statistics

import pytest
from test_step_watch import UNIRL, monitor_of, synthetic

from vpo_engine.config_file import load_config
from vpo_engine.metrics.step_watch import StepWatch


@pytest.mark.parametrize(("change", "raised"), [(0.3, False), (1.0, True)])
def test_a_look_that_hardly_varies_may_change_as_rounding_to_bytes_does(change: float, raised: bool) -> None:
    """Clips differ by a twentieth of a level; half a level counts as their deviation."""
    watch, levels = StepWatch(load_config(None, [])), []
    for step in range(1, 21):
        row = {"watch/brightness": 60 + change * (step > 6), "watch/sd/brightness": 0.05}
        levels.append(watch.observe(step, row | {"watch/se/brightness": 0.02})[0]["guards/level/style"])
    assert (max(levels) >= 1) == raised
    assert raised or max(levels) == 0


def test_the_advised_floor_of_motion_is_a_share_of_what_was_normal() -> None:
    watch, alarms = StepWatch(load_config(None, [])), []
    for step in range(1, 11):
        row = {"watch/motion": 2.0 if step < 6 else 0.5, "watch/sd/motion": 0.3, "watch/se/motion": 0.1}
        alarms += watch.observe(step, row)[1]
    assert "candidates move 75% less than in the first steps" in alarms[0].text
    assert "set guards.motion_floor=1.4, so that still videos never win" in alarms[0].text
    assert alarms[0].limit == pytest.approx(1.5)


def test_a_falling_score_is_tolerated_down_to_below_its_first_mean() -> None:
    rows = synthetic(6, 20, **UNIRL)
    monitor = monitor_of(rows)
    (alarm,) = [alarm for row in rows[1:] for alarm in monitor.step(row["step"], row)[1]]
    mean = statistics.fmean(row["reward/reading"] for row in rows[1:5])
    assert (alarm.metric, alarm.limit) == ("reward/reading", pytest.approx(mean - 0.2 * 0.04))


@pytest.mark.parametrize(("bound", "raised"), [("2.0", False), ("0.5", True)])
def test_looks_may_change_by_three_quarters_of_the_bound_that_is_set(bound: str, raised: bool) -> None:
    """Clips become brighter by one deviation."""
    watch, levels = StepWatch(load_config(None, [f"guards.style_bound={bound}"])), []
    for step in range(1, 21):
        row = {
            "watch/brightness": 60 + 10 * (step > 6),
            "watch/sd/brightness": 10.0,
            "watch/se/brightness": 1.0,
        }
        levels.append(watch.observe(step, row)[0]["guards/level/style"])
    assert (max(levels) >= 1) == raised


def test_what_is_tolerated_of_the_winners_error_is_a_share_of_the_references() -> None:
    rows = synthetic(6, 14, winner_error_change=lambda since: 0.05, loser_error_change=lambda since: 0.06)
    monitor = monitor_of(rows)
    (alarm,) = [alarm for row in rows[1:] for alarm in monitor.step(row["step"], row)[1]]
    assert (alarm.kind, alarm.limit) == ("shortcut", pytest.approx(0.08 * 0.15))
