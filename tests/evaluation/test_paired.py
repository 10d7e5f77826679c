"""The statistics of a paired comparison, against closed forms and published examples."""

from __future__ import annotations

import math
import random

import pytest

from vpo_engine.evaluation.paired import (
    bootstrap,
    compare_pairs,
    correct,
    holm,
    krippendorff,
    sign_test,
    verdict,
    wilson,
)


def test_prompts_are_the_unit_and_not_videos() -> None:
    """A prompt with a thousand videos counts as one, and repeating videos makes no bound narrower."""
    few = {f"p{n}": [(0.0, float(n % 3))] for n in range(12)}
    many = {prompt: values * (1000 if prompt == "p0" else 5) for prompt, values in few.items()}
    one, other = compare_pairs(few, 1), compare_pairs(many, 1)
    assert one.difference == pytest.approx(1.0)
    assert (one.difference, one.low, one.high, one.win_rate, one.p_value) == (
        other.difference,
        other.low,
        other.high,
        other.win_rate,
        other.p_value,
    )
    assert (one.prompts, one.pairs, other.pairs) == (12, 12, 1055)


def test_bounds_hold_the_mean_as_often_as_they_say() -> None:
    """The share of 400 bounds that hold the true mean lies within four standard errors of 95 %, for few prompts too.

    A plain percentile bootstrap of eight values holds it in about 89 %, which is outside; any bootstrap of two values
    holds it in 50 % at most, and one of five in 94 %.
    """
    draw = random.Random(3)
    for count in (2, 5, 8, 30):
        held = 0
        for trial in range(400):
            values = [draw.gauss(1.0, 2.0) for _ in range(count)]
            low, high = bootstrap(values, trial, resamples=1000)
            assert low is not None
            assert high is not None
            held += low <= 1.0 <= high
        assert abs(held / 400 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)


def test_equal_arguments_give_equal_bounds_and_one_prompt_has_none() -> None:
    values = [0.3, -0.1, 0.8, 0.2]
    assert bootstrap(values, 1) == bootstrap(values, 1)
    assert bootstrap([0.7]) == (None, None)
    alone = compare_pairs({"a": [(1.0, 2.0), (1.0, 3.0)]}, 1)
    assert (alone.difference, alone.low, verdict(alone, 1)) == (1.5, None, "no bounds")


def test_win_rate_counts_ties_as_half_and_follows_the_direction() -> None:
    pairs = {"a": [(1.0, 2.0), (1.0, 1.0)], "b": [(3.0, 2.0), (3.0, 3.0)], "c": [(0.0, 1.0), (0.0, 1.0)]}
    up, down = compare_pairs(pairs, 1), compare_pairs(pairs, -1)
    assert up.win_rate == pytest.approx((0.75 + 0.25 + 1.0) / 3)
    assert down.win_rate == pytest.approx(1 - (0.75 + 0.25 + 1.0) / 3)
    assert (up.better, up.worse, up.tied) == (2, 1, 0)
    assert (down.better, down.worse, down.tied) == (1, 2, 0)
    assert compare_pairs(pairs, 0).win_rate is None


def test_verdict_follows_the_bounds_and_the_direction() -> None:
    risen = compare_pairs({f"p{n}": [(0.0, 1.0 + n / 10)] for n in range(6)}, 1)
    assert [verdict(risen, better) for better in (1, -1, 0)] == ["better", "worse", "changed"]
    flat = compare_pairs({f"p{n}": [(0.0, (-1.0) ** n)] for n in range(6)}, 1)
    assert verdict(flat, 1) == "not clear"


def test_the_sign_test_is_exact() -> None:
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(2, 8) == sign_test(8, 2)
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 0) == 1.0
    assert sign_test(2000, 1000) < 1e-70


def test_holm_corrects_step_by_step() -> None:
    """The example of Holm's procedure with p = 0.01, 0.04, 0.03, 0.005."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(found) == ["a", "b", "c", "d"]
    assert list(found.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_all_comparisons_are_corrected_together() -> None:
    clear = compare_pairs({f"p{n}": [(0.0, 1.0)] for n in range(6)}, 1)
    found = correct({"a": clear, "b": clear})
    assert clear.p_value == pytest.approx(2 / 64)
    assert found["a"].p_holm == pytest.approx(4 / 64)


def test_values_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt 'a' has the values 1\.0 and nan"):
        compare_pairs({"a": [(1.0, math.nan)]}, 1)
    with pytest.raises(ValueError, match="no pair of videos"):
        compare_pairs({}, 1)


def test_wilson_against_a_published_example() -> None:
    """Newcombe (Statistics in Medicine 1998, table I, method 3): 81/263 gives 0.2553 to 0.3662, 0/20 0 to 0.1611."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
    assert wilson(4.5, 10) == pytest.approx(tuple(1 - bound for bound in reversed(wilson(5.5, 10))))
    with pytest.raises(ValueError, match="at least one case"):
        wilson(0, 0)


def test_krippendorff_against_its_published_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), C: four observers, nominal, alpha 0.743."""
    rows = {
        "a": "1 2 3 3 2 1 4 1 2 . . .",
        "b": "1 2 3 3 2 2 4 1 2 5 . 3",
        "c": ". 3 3 3 2 3 4 2 2 5 1 .",
        "d": "1 2 3 3 2 4 4 1 2 5 1 .",
    }
    columns = zip(*(row.split() for row in rows.values()), strict=True)
    units = [
        {who: value for who, value in zip(rows, column, strict=True) if value != "."} for column in columns
    ]
    assert krippendorff(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff([{"a": "x", "b": "x"}, {"a": "y", "b": "y"}]) == 1.0
    assert krippendorff([{"a": "x"}, {"a": "y"}]) is None
    assert krippendorff([{"a": "x", "b": "x"}]) is None


def test_the_bounds_of_the_win_rate_are_of_shares_and_lie_between_none_and_all() -> None:
    pairs = {f"p{n}": [(0.0, 100.0 if n % 3 else -100.0)] for n in range(12)}
    for better in (1, -1):
        found, wins = compare_pairs(pairs, better), [float((n % 3 > 0) == (better > 0)) for n in range(12)]
        assert (found.win_low, found.win_high) == bootstrap(wins)
    few = compare_pairs({"a": [(0.0, 1.0)], "b": [(0.0, 1.0), (0.0, 0.0)]}, 1)
    assert (few.win_low, few.win_high) == (0.0, 1.0)
