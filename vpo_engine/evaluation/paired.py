"""Compare two policies on the same prompts and noise: intervals, win rates and tests. Prompts are the unit.

Videos of one prompt resemble each other, so a hundred videos of ten prompts say about as much as ten prompts do. All
intervals and tests here are therefore over prompts. P: prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vpo_engine.metrics.student_t import student_t_quantile
from vpo_engine.seeding import generator

CONFIDENCE = 0.95
RESAMPLES = 10_000
FEWEST = 6
"""Fewest values that are resampled: smallest and largest of P values enclose their median in 1 - 2^(1-P) of cases."""

Pairs = Mapping[str, Sequence[tuple[float, float]]]
"""For each prompt, its pairs of values: that of the baseline's video, and that of the policy's with the same noise."""


@dataclass(frozen=True)
class Comparison:
    """The difference of a measure between a policy and a baseline.

    difference: the mean over prompts of each prompt's mean difference, policy minus baseline. low, high: its bounds;
    None with a single prompt, where nothing tells how much prompts differ. win_rate: the share of pairs that the policy
    wins, averaged over prompts, with ties as half; None for a measure of which neither direction is better. better,
    worse, tied: prompts by their mean difference. p_value: of the exact sign test over prompts, two-sided. p_holm: the
    same, corrected for the number of measures (see ``correct``).
    """

    difference: float
    low: float | None
    high: float | None
    win_rate: float | None
    win_low: float | None
    win_high: float | None
    better: int
    worse: int
    tied: int
    p_value: float
    prompts: int
    pairs: int
    p_holm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def compare_pairs(pairs: Pairs, better: int, seed: int = 0) -> Comparison:
    """Compare a measure on pairs of videos. ``better``: +1 if more is better, -1 if less is, 0 if neither.

    Without a direction, a prompt counts as "better" where the policy has more. The same arguments give the same bounds.
    Raise ValueError if there is no pair, and for a value that is not finite.
    """
    if not pairs or not all(pairs.values()):
        raise ValueError(
            "there is no pair of videos to compare; give at least one prompt that both policies have"
        )
    for prompt, values in pairs.items():
        for before, after in values:
            if not (math.isfinite(before) and math.isfinite(after)):
                raise ValueError(
                    f"prompt {prompt!r} has the values {before} and {after}, expected finite numbers"
                )
    sign = better or 1
    differences = [[after - before for before, after in values] for values in pairs.values()]
    means = [math.fsum(each) / len(each) for each in differences]
    wins = [sum(_win(sign * value) for value in each) / len(each) for each in differences]
    counts = [sum(_side(sign * mean) == side for mean in means) for side in (1, -1, 0)]
    low, high = bootstrap(means, seed)
    win_low, win_high = bootstrap(wins, seed) if better else (None, None)
    return Comparison(
        difference=math.fsum(means) / len(means),
        low=low,
        high=high,
        win_rate=math.fsum(wins) / len(wins) if better else None,
        win_low=None if win_low is None else max(0.0, win_low),
        win_high=None if win_high is None else min(1.0, win_high),
        better=counts[0],
        worse=counts[1],
        tied=counts[2],
        p_value=sign_test(counts[0], counts[1]),
        prompts=len(means),
        pairs=sum(map(len, differences)),
    )


def bootstrap(
    values: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> tuple[float | None, float | None]:
    """Return the bounds of the mean of P values by a percentile bootstrap; None for a single value.

    The bounds of fewer than ``FEWEST`` values are Student's t: no resample has a mean beyond the values themselves, and
    two values have the true mean between them only half of the time.

    The percentiles are moved outwards for small P, so that the bounds of normal values are as wide as Student's t
    makes them (Hesterberg, The American Statistician 2015, section 4.2.3); plain percentiles are too narrow by the
    factor sqrt((P - 1) / P) times the ratio of the quantiles of the normal distribution and of Student's t.
    """
    count = len(values)
    if count < 2:
        return None, None
    quantile = student_t_quantile((1 + confidence) / 2, count - 1)
    if count < FEWEST:
        mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count)
        return mean - half, mean + half
    tail = 0.5 * math.erfc(quantile * math.sqrt(count / (count - 1)) / math.sqrt(2))
    picks = torch.randint(count, (resamples, count), generator=generator(seed, "bootstrap", count))
    means = torch.tensor(values, dtype=torch.float64)[picks].mean(1)
    edges = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return edges[0], edges[1]


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p value of the exact sign test; ties are left out before."""
    count = better + worse
    if not count:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p values for their number (Holm 1979): rejecting those below 0.05 errs at all in at most 5 % of cases."""
    corrected: dict[str, float] = {}
    largest, count = 0.0, len(p_values)
    for place, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (count - place) * value))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def correct(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Return the comparisons with ``p_holm`` over all of them."""
    found = holm({name: each.p_value for name, each in comparisons.items()})
    return {
        name: Comparison(**{**each.to_json(), "p_holm": found[name]}) for name, each in comparisons.items()
    }


def verdict(comparison: Comparison, better: int) -> str:
    """Return "better", "worse" or, without a direction, "changed" if the bounds exclude zero; else "not clear".

    A single prompt has no bounds, which is "no bounds".
    """
    if comparison.low is None or comparison.high is None:
        return "no bounds"
    if comparison.low <= 0 <= comparison.high:
        return "not clear"
    return {1: "better", -1: "worse", 0: "changed"}[better * (1 if comparison.low > 0 else -1)]


def wilson(successes: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the bounds of a share by Wilson's score interval (JASA 1927). ``successes`` may count ties as half.

    Raise ValueError for no case at all, and for more successes than cases.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(
            f"a share needs at least one case and at most as many successes, got {successes} of {count}"
        )
    z, share = _normal_quantile((1 + confidence) / 2), successes / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def krippendorff(ratings: Sequence[Mapping[str, str]]) -> float | None:
    """Return Krippendorff's alpha for nominal ratings: 1 is full agreement, 0 is what chance gives.

    ratings: for each unit {rater: category}; units with fewer than two ratings are left out. None if no unit has two,
    and if all ratings are the same category, where chance agrees fully and alpha is not defined.
    """
    units = [list(unit.values()) for unit in ratings if len(unit) > 1]
    total: dict[str, int] = {}
    disagreement = 0.0
    for unit in units:
        counts = {category: unit.count(category) for category in dict.fromkeys(unit)}
        for category, number in counts.items():
            total[category] = total.get(category, 0) + number
            disagreement += number * (len(unit) - number) / (len(unit) - 1)
    count = sum(total.values())
    expected = sum(number * (count - number) for number in total.values())
    if not expected:
        return None
    return 1 - (count - 1) * disagreement / expected


def _normal_quantile(probability: float) -> float:
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def _side(value: float) -> int:
    return (value > 0) - (value < 0)


def _win(value: float) -> float:
    return 0.5 * (1 + _side(value))
