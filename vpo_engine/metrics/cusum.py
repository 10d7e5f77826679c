"""A sequential test of one statistic of the steps: does it stay near where the run began?

The test is Page's cumulative sum (E. S. Page, Continuous inspection schemes, Biometrika 1954), whose threshold follows
from the wanted rate of false alarms by Siegmund's approximation (D. Siegmund, Sequential Analysis, 1985, section 2.6).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIRST = 4
"""Fewest steps from which it is learned what is normal."""
_FREEDOM = 28
"""Least degrees of freedom of the standard error that is learned: those of 4 steps of 8 prompts. With the 4 of 4 steps
of 2 prompts the error is often far too small: a third of honest runs of 300 steps raised an alarm."""
STEPS_TO_FALSE_ALARM = 1.6e7
"""Mean number of steps to a false alarm of one sum. A run has 12 of them, and one for each score that reads the prompt:
of 10,000 steps without any change about one run in a hundred would raise an alarm if the noise were known exactly."""
_LEAST_CLEARANCE = 1.25
"""Least distance of the tolerance from what is normal, in standard errors of a step; see ``Cusum``. A change is
noticed within five steps if it lies threshold(c) / 5 above a tolerance at a distance of c; so it is of the smallest
change, 2.4 standard errors, at this distance."""
_OVERSHOOT = 1.166
"""Siegmund's correction for steps that are not infinitely small."""


def threshold(clearance: float) -> float:
    """Return the threshold of a sum of unit normal steps that fall by ``clearance`` on the average."""
    steps = 2 * clearance**2 * STEPS_TO_FALSE_ALARM
    return max(math.log(steps) / (2 * clearance) - _OVERSHOOT, 1.0)


def steps_to_learn(prompts: int) -> int:
    """Return from how many steps of ``prompts`` prompts it is learned what is normal.

    A step of a single prompt does not tell how much prompts differ; as many steps as are needed do.
    """
    return max(FIRST, math.ceil(_FREEDOM / (prompts - 1))) if prompts > 1 else _FREEDOM + 1


@dataclass
class Cusum:
    """The sum of what a statistic exceeds its tolerance by, on one side, in standard errors of a step.

    tolerance: the change that is no reason for an alarm, in the statistic's natural unit. expected: the change that is
    normal, in the same unit. At each step the excess over the tolerance is added, which is negative where there is
    none; the sum never falls below 0. The alarm is raised when it reaches the threshold, of which a single step adds
    at most half. Where a step is too noisy for the tolerance, the tolerance grows to what its noise allows.
    """

    tolerance: float
    expected: float = 0.0
    total: float = 0.0
    since: int = 0
    """The first step after the sum was last 0: about where the change began."""

    def __call__(self, step: int, change: float, error: float, uncertainty: float = 0.0) -> float:
        """Add a step's change and return the sum as a share of the threshold: 1 or more is an alarm.

        error: the standard error of ``change`` in its unit. uncertainty: that of what the change is counted from.
        """
        clearance = (self.tolerance - self.expected - 2 * uncertainty) / error
        limit = threshold(max(clearance, _LEAST_CLEARANCE))
        tolerated = self.tolerance + max(_LEAST_CLEARANCE - clearance, 0.0) * error
        if not self.total:
            self.since = step
        self.total = max(0.0, self.total + min((change - tolerated) / error, limit / 2))
        return self.total / limit

    def state(self) -> list[float]:
        return [self.total, self.since]

    def load(self, state: Sequence[float]) -> None:
        self.total, self.since = float(state[0]), int(state[1])


class Normal:
    """The normal state of a statistic: its mean over the first steps, the unit of its changes, and its standard error.

    mean, unit, error: known after ``first`` steps. The unit is the standard deviation of single videos; with
    ``relative`` it is the mean, so that changes are shares of it. It is 0 where the statistic says nothing. The error
    is that of a single step. Later steps are judged by it and not by their own errors, which grow with the damage that
    is looked for: videos that are spoilt, each in another way, differ more than sound ones.
    """

    def __init__(self, relative: bool = False, least_deviation: float = 0.0, first: int = FIRST) -> None:
        self._relative, self._least_deviation, self.first = relative, least_deviation, first
        self.seen: list[list[float]] = []
        self.mean = self.unit = self.error = 0.0

    def learn(self, value: float, deviation: float, error: float) -> bool:
        """Take one of the first steps, and return True; False once they are all known."""
        if len(self.seen) >= self.first:
            return False
        self.load([*self.seen, [value, deviation, error]])
        return True

    def load(self, seen: Sequence[Sequence[float]]) -> None:
        """Take the value, deviation and error of each of the first steps so far, which ``seen`` holds."""
        self.seen = [list(row) for row in seen]
        if not seen:
            return
        values, deviations, errors = zip(*seen, strict=True)
        self.mean, self.error = math.fsum(values) / len(seen), _root_mean_square(errors)
        if len(seen) >= _FREEDOM:  # so many steps tell by themselves how far one lies from the others
            self.error = max(self.error, statistics.stdev(values))
        spread = max(_root_mean_square(deviations), self._least_deviation)
        self.unit = abs(self.mean) if self._relative else spread


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))


class Drift:
    """Watches how far a statistic has gone from where it began, upwards, downwards or both ways."""

    def __init__(
        self,
        tolerance: float,
        ways: str,
        relative: bool = False,
        least_deviation: float = 0.0,
        first: int = FIRST,
    ) -> None:
        """``ways``: "+", "-" or "+-". ``tolerance``: in the unit of ``Normal``. ``first``: steps to learn from."""
        self.normal = Normal(relative, least_deviation, first)
        self.sums = {way: Cusum(tolerance) for way in ways}
        self.way = ways[0]
        """The way whose sum is larger."""

    def __call__(self, step: int, value: float, deviation: float, error: float) -> float:
        """Take a step and return the larger sum as a share of its threshold; 0 for the first steps."""
        normal = self.normal
        if normal.learn(value, deviation, error) or not normal.unit:
            return 0.0
        noise = normal.error / normal.unit
        if not noise:
            return 0.0
        change = self.change(value)
        levels = {
            way: sum_(step, change if way == "+" else -change, noise, noise / math.sqrt(normal.first))
            for way, sum_ in self.sums.items()
        }
        self.way = max(levels, key=lambda way: levels[way])
        return levels[self.way]

    def change(self, value: float) -> float:
        """Return how far a value is from what is normal, in its unit."""
        return (value - self.normal.mean) / self.normal.unit

    def limit(self) -> float:
        """Return the value up to which nothing is said, on the side that has gone further."""
        sign = 1 if self.way == "+" else -1
        return self.normal.mean + sign * self.sums[self.way].tolerance * self.normal.unit

    @property
    def since(self) -> int:
        return self.sums[self.way].since

    def state(self) -> dict[str, Any]:
        return {"normal": self.normal.seen, "sums": {way: each.state() for way, each in self.sums.items()}}

    def load(self, state: dict[str, Any]) -> None:
        self.normal.load(state["normal"])
        for way, each in self.sums.items():
            each.load(state["sums"][way])
