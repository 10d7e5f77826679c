"""Intervals over seeds and clips, and verdicts."""

from __future__ import annotations

import math

import pytest

from vpo_engine.reproducing.statistics import interval, minus, verdict


def test_one_seed_has_students_interval_over_its_clips() -> None:
    found = interval({0: [1.0, 2.0, 3.0, 4.0]})
    # sd 1.2910, standard error 0.6455, t(0.975, 3) = 3.18245
    assert (found.mean, found.seeds, found.clips) == (2.5, 1, 4)
    assert found.half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)


def test_seeds_that_differ_give_the_interval_over_seeds() -> None:
    found = interval({0: [1.0, 1.0], 1: [2.0, 2.0], 2: [3.0, 3.0]})
    # means 1, 2, 3: sd 1, t(0.975, 2) = 4.302653
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_seeds_that_agree_by_chance_keep_the_interval_over_clips() -> None:
    """Both seeds have mean 2, so that only the clips tell how much is uncertain: they count as four of one group."""
    found = interval({0: [1.0, 3.0], 1: [1.0, 3.0]})
    # the variance of a mean of two clips is 2 / 2; of the mean of both seeds 1 / 2; t(0.975, 2) = 4.302653
    assert found.half == pytest.approx(4.302653 * math.sqrt(0.5), rel=1e-6)


def test_a_single_number_has_no_interval() -> None:
    assert interval({0: [1.5]}).half is None
    assert interval({0: [1.5]}).sign == 0
    with pytest.raises(ValueError, match="at least one clip"):
        interval({})


def test_differences_are_taken_clip_by_clip_for_seeds_that_both_have() -> None:
    assert minus({0: [3.0, 5.0], 1: [1.0, 1.0]}, {0: [1.0, 1.0], 2: [0.0, 0.0]}) == {0: [2.0, 4.0]}
    with pytest.raises(ValueError, match="shorter"):
        minus({0: [1.0, 2.0]}, {0: [1.0]})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, 1.1]], "agrees"),
        ([[1.0, 1.1], [0.5, 0.51]], "agrees"),
        ([[1.0, 1.1], [-1.0, 1.0]], "cannot tell"),
        ([[1.0, 1.1], [-1.0, 1.0], [-1.0, -1.01]], "disagrees"),
        ([[1.0]], "cannot tell"),
        ([], "not run"),
    ],
)
def test_a_verdict_needs_all_intervals_on_one_side(rows: list[list[float]], expected: str) -> None:
    assert verdict([{0: row} for row in rows]) == expected


def test_a_comparison_that_was_not_run_makes_no_verdict() -> None:
    assert verdict([{0: [1.0, 1.1]}, {}]) == "not run"
