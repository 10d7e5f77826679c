"""Intervals over seeds and clips, and what they say about a claim of the paper.

Clip i of a seed has the same prompt and the same noise in every row, so that rows are compared clip by clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vpo_engine.metrics.student_t import student_t_quantile
from vpo_engine.metrics.summary import CONFIDENCE

Verdict = Literal["agrees", "disagrees", "cannot tell", "not run"]
Clips = Mapping[int, Sequence[float]]
"""One number for each clip, by seed."""


@dataclass(frozen=True)
class Interval:
    """A mean with a symmetric 95 % interval; ``half`` is None if nothing tells how much the numbers scatter."""

    mean: float
    half: float | None
    seeds: int
    clips: int

    @property
    def sign(self) -> int:
        """Return +1 or -1 if the interval excludes zero, and 0 otherwise."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def interval(values: Clips) -> Interval:
    """Return the mean over clips and seeds and its interval.

    The half width is the larger of two: Student's t over the means of the seeds, which counts what differs from run to
    run, and Student's t over all clips, which bounds it from below where few seeds happen to agree. With one seed it is
    the second alone. ValueError without values.
    """
    rows = [list(row) for row in values.values()]
    if not rows or not all(rows):
        raise ValueError("an interval needs at least one seed with at least one clip")
    means = [math.fsum(row) / len(row) for row in rows]
    mean, count = math.fsum(means) / len(means), sum(map(len, rows))
    halves = []
    if len(means) > 1:
        spread = math.sqrt(math.fsum((one - mean) ** 2 for one in means) / (len(means) - 1))
        halves.append(_quantile(len(means) - 1) * spread / math.sqrt(len(means)))
    degrees = count - len(rows)
    if degrees > 0 and all(len(row) > 1 for row in rows):
        errors = [
            math.fsum((value - own) ** 2 for value in row) / (len(row) - 1) / len(row)
            for row, own in zip(rows, means, strict=True)
        ]
        halves.append(_quantile(degrees) * math.sqrt(math.fsum(errors)) / len(rows))
    return Interval(mean, max(halves) if halves else None, len(rows), count)


def minus(first: Clips, second: Clips) -> dict[int, list[float]]:
    """Return first - second, clip by clip, for the seeds that both have. ValueError for different numbers of clips."""
    return {
        seed: [one - other for one, other in zip(first[seed], second[seed], strict=True)]
        for seed in first
        if seed in second
    }


def verdict(differences: Sequence[Clips]) -> Verdict:
    """Return what differences say that the paper has above zero.

    All intervals above zero: "agrees". One below zero: "disagrees". Otherwise "cannot tell"; without any: "not run".
    """
    if not differences or not all(differences):
        return "not run"
    signs = [interval(values).sign for values in differences]
    if min(signs) < 0:
        return "disagrees"
    return "agrees" if min(signs) > 0 else "cannot tell"


def _quantile(degrees: int) -> float:
    return student_t_quantile(0.5 + CONFIDENCE / 2, degrees)
