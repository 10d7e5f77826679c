"""Test the sequential test of a statistic: its rate of false alarms, and how soon it notices a change."""

from __future__ import annotations

import random
import statistics

import pytest

from vpo_engine.metrics import cusum
from vpo_engine.metrics.cusum import FIRST, Cusum, Drift, steps_to_learn, threshold


def steps_to_alarm(change: float, seed: int, most: int, tolerance: float = 1.0) -> int:
    """Return the step at which changes of unit normal noise about ``change`` raise an alarm; ``most`` without one."""
    noise, test = random.Random(seed), Cusum(tolerance)
    for step in range(1, most):
        if test(step, noise.gauss(change, 1.0), 1.0) >= 1:
            return step
    return most


def test_the_threshold_gives_the_wanted_rate_of_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 500 steps to a false alarm 40 runs of at most 5,000 steps take about that; their mean has an error of 16 %.

    The threshold is an approximation, and a step adds at most half of it; both make alarms rarer, never more frequent.
    """
    monkeypatch.setattr(cusum, "STEPS_TO_FALSE_ALARM", 500.0)
    monkeypatch.setattr(cusum, "_LEAST_CLEARANCE", 0.5)
    lengths = [steps_to_alarm(0.0, seed, 5000) for seed in range(40)]
    assert 300 < sum(lengths) / len(lengths) < 1500


def test_ten_thousand_steps_without_a_change_raise_no_alarm() -> None:
    assert [steps_to_alarm(0.0, seed, 10_000) for seed in range(5)] == [10_000] * 5


@pytest.mark.parametrize(("change", "within"), [(2.0, 16), (3.0, 8), (6.0, 4)])
def test_a_change_beyond_the_tolerance_is_noticed_the_sooner_the_larger_it_is(
    change: float, within: int
) -> None:
    assert max(steps_to_alarm(change, seed, 100) for seed in range(20)) <= within


def test_no_single_step_raises_an_alarm() -> None:
    test = Cusum(1.0)
    assert [test(step, 1e9, 1.0) for step in (1, 2)] == [0.5, 1.0]
    assert test.since == 1


def test_a_step_too_noisy_for_the_tolerance_widens_it() -> None:
    """With a noise of ten tolerances, a change of two tolerances in every step is nothing to speak of."""
    test = Cusum(0.1)
    assert max(test(step, 0.2, 1.0) for step in range(1, 1000)) == 0.0


def test_the_sum_begins_again_where_a_change_ends() -> None:
    test = Cusum(2.0)
    for step in range(1, 4):
        test(step, 3.0, 1.0)
    assert (test.total, test.since) == (3.0, 1)
    for step in range(4, 8):
        test(step, 0.0, 1.0)
    assert (test.total, test.since) == (0.0, 7)


def test_thresholds_grow_as_the_noise_does() -> None:
    limits = [threshold(clearance) for clearance in (0.5, 1.0, 2.0, 4.0)]
    assert limits == sorted(limits, reverse=True)


@pytest.mark.parametrize(
    ("ways", "sign", "raised"), [("+", 1, True), ("+", -1, False), ("-", -1, True), ("+-", -1, True)]
)
def test_a_drift_counts_from_the_first_steps_and_in_its_ways(ways: str, sign: int, raised: bool) -> None:
    drift = Drift(0.5, ways)
    levels = [drift(step, 60.0 + sign * max(0, step - 6) * 2.0, 10.0, 1.0) for step in range(1, 15)]
    assert levels[:6] == [0.0] * 6
    assert (levels[-1] >= 1) == raised
    assert drift.normal.mean == 60.0
    if raised:
        assert drift.limit() == 60.0 + sign * 5.0
        assert drift.since == 9  # changes up to half of the deviation of 10 are tolerated


def first_alarm(prompts: int, seed: int, first: int, shift: float = 0.0) -> int | None:
    """Return when 150 steps raise an alarm; ``shift``: a change after step 50, in deviations of a prompt's videos.

    Prompts differ with a deviation of 1, and the videos of one prompt, of which a step has four, with 0.5.
    """
    noise, drift = random.Random(seed), Drift(0.75, "+-", first=first)
    for step in range(1, 151):
        means = [noise.gauss(shift * (step > 50), (1 + 0.25 / 4) ** 0.5) for _ in range(prompts)]
        error = 0.5 if prompts == 1 else statistics.stdev(means) / prompts**0.5
        if drift(step, statistics.fmean(means), 1.25**0.5, error) >= 1:
            return step
    return None


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_steps_of_few_prompts_are_learned_from_for_longer_so_that_honest_ones_raise_no_alarm(
    prompts: int,
) -> None:
    """The four steps that are enough for eight prompts take the noise of one or two for far smaller than it is."""
    first = steps_to_learn(prompts)
    assert [first_alarm(prompts, seed, first) for seed in range(40)] == [None] * 40
    if prompts < 4:
        assert sum(first_alarm(prompts, seed, FIRST) is not None for seed in range(40)) >= 4
    late = [first_alarm(prompts, seed, first, shift=6.0) for seed in range(10)]
    assert all(step is not None and 50 < step <= 56 for step in late)


def test_steps_of_eight_prompts_or_more_are_learned_from_as_ever() -> None:
    assert [steps_to_learn(prompts) for prompts in (1, 2, 3, 4, 8, 16)] == [29, 28, 14, 10, FIRST, FIRST]


def test_a_statistic_that_never_varies_is_never_judged() -> None:
    drift = Drift(0.5, "+-")
    assert max(drift(step, 3.0, 0.0, 0.0) for step in range(1, 20)) == 0.0
