"""The stage of a run that a process is in, for the watchdog."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

STARTING, BETWEEN = "start", "work between stages"
"""What a process does before its first stage, and outside of all stages."""


class Position(NamedTuple):
    """A stage of a step, since when it has been the innermost one, and whether it waits for other processes there."""

    stage: str
    step: int
    since: float
    waiting: bool = False


class Stages:
    """Tells which stage this process is in, as its main thread enters and leaves them.

    A stage's time counts anew whenever a stage inside of it begins or ends, or ``reached`` is called, so it is time in
    which nothing was reached. ``longest`` holds the longest such time of each stage so far; waiting for others does not
    count there. ``ended``: stages that have ended at least once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.now = Position(STARTING, 0, clock())
        self.longest: dict[str, float] = {}
        self.ended: set[str] = set()
        self._reached_at = clock()

    @property
    def since(self) -> float:
        """Return when something was reached last."""
        return max(self.now.since, self._reached_at)

    def reached(self) -> None:
        """Mark progress inside of a stage. Any thread may call this."""
        self._keep_longest()
        self._reached_at = self._clock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Mark a block of code as a stage."""
        before = self.now
        if before.stage == BETWEEN:
            self.ended.add(BETWEEN)
        self._change(stage, before.waiting)
        try:
            yield
        finally:
            self.ended.add(stage)
            self._change(BETWEEN if before.stage == STARTING else before.stage, before.waiting)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a block of code in which this process waits for others."""
        before = self.now
        self._change(before.stage, True)
        try:
            yield
        finally:
            self._change(before.stage, before.waiting)

    def begin_step(self, step: int) -> None:
        """Set the step that is made from now on."""
        self.now = self.now._replace(step=step)

    def _change(self, stage: str, waiting: bool) -> None:
        self._keep_longest()
        self.now = Position(stage, self.now.step, self._clock(), waiting)

    def _keep_longest(self) -> None:
        if not (now := self.now).waiting:
            self.longest[now.stage] = max(self._clock() - self.since, self.longest.get(now.stage, 0.0))
