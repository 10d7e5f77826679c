"""Measures of how well a reward ranks candidates that people have ranked: MRR and recall@k (OnlineVPO, table 2).

For each prompt there are some candidates, of which people prefer one. Its rank by score is 1 plus the number of
candidates that score higher; candidates that tie with it count by ``ties``. MRR is the mean of 1 / rank, recall@k the
share of prompts whose preferred candidate has a rank of at most k. Shares are of 1, not per cent. P: prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vpo_engine.seeding import generator

Ties = Literal["mean", "optimistic", "pessimistic"]
_TIED = {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}
RECALLS = (1, 2, 4)


@dataclass(frozen=True)
class Estimate:
    """A measure over prompts: its value and a confidence interval, None with a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ranking:
    """MRR and recalls of one scorer. ``chance``: what random scores give on average, by the same names."""

    prompts: int
    measures: dict[str, Estimate]
    chance: dict[str, float]


def ranks(scores: Sequence[Sequence[float]], preferred: Sequence[int], ties: Ties = "mean") -> Tensor:
    """Return the rank of each prompt's preferred candidate, float64 [P].

    scores: for each prompt, one number per candidate, higher is better; prompts may have different numbers of
    candidates. preferred: index of the preferred one. ties: each tied candidate adds 1/2 (mean), 0 or 1. Raise
    ValueError for fewer than two candidates, an index outside of them, and a score that is not finite.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties is {ties!r}, expected one of {', '.join(get_args(Ties))}")
    if len(scores) != len(preferred) or not scores:
        raise ValueError(
            f"{len(scores)} prompts have scores and {len(preferred)} a preference; give one each, at least one"
        )
    result = []
    for prompt, (row, best) in enumerate(zip(scores, preferred, strict=True)):
        if len(row) < 2:
            raise ValueError(f"prompt {prompt} has {len(row)} candidates, expected at least 2 to rank")
        if not 0 <= best < len(row):
            raise ValueError(
                f"prompt {prompt} prefers candidate {best}, but has candidates 0 to {len(row) - 1}"
            )
        for candidate, score in enumerate(row):
            if not math.isfinite(score):
                raise ValueError(
                    f"prompt {prompt}, candidate {candidate} has score {score}, expected a finite number"
                )
        higher = sum(score > row[best] for score in row)
        tied = sum(score == row[best] for score in row) - 1
        result.append(1 + higher + _TIED[ties] * tied)
    return torch.tensor(result, dtype=torch.float64)


def rank_preferences(
    scores: Sequence[Sequence[float]],
    preferred: Sequence[int],
    *,
    ties: Ties = "mean",
    recalls: Sequence[int] = RECALLS,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Ranking:
    """Compute MRR and recall@k ("mrr", "recall@1", ...) with percentile intervals of a bootstrap over prompts.

    scores, preferred, ties: as of ``ranks``. The same arguments give the same intervals.
    """
    if not recalls or min(recalls) < 1:
        raise ValueError(f"recalls are {list(recalls)}, expected whole numbers of at least 1")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence {confidence} must lie between 0 and 1, resamples {resamples} be at least 1"
        )
    rank = ranks(scores, preferred, ties)
    values = {"mrr": 1 / rank} | {f"recall@{k}": (rank <= k).double() for k in recalls}
    names, table = list(values), torch.stack(list(values.values()))  # [measures, P]
    count = len(rank)
    means = table.mean(1).tolist()
    bounds: list[tuple[float | None, float | None]] = [(None, None)] * len(names)
    if count > 1:
        picks = torch.randint(count, (resamples, count), generator=generator(seed, "ranking", count))
        tail = (1 - confidence) / 2
        drawn = table[:, picks].mean(2)  # [measures, resamples]
        edges = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1)
        bounds = [(low, high) for low, high in edges.T.tolist()]
    measures = {name: Estimate(means[i], *bounds[i]) for i, name in enumerate(names)}
    return Ranking(count, measures, chance([len(row) for row in scores], recalls))


def chance(candidates: Sequence[int], recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """Compute the expected measures of random scores without ties, given each prompt's number of candidates."""
    total = len(candidates)
    expected = {"mrr": sum(sum(1 / rank for rank in range(1, n + 1)) / n for n in candidates) / total}
    return expected | {f"recall@{k}": sum(min(k / n, 1.0) for n in candidates) / total for k in recalls}
