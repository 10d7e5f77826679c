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

    A stage's time counts anew whenever a stage inside of it begins or ends, so it is time in which nothing was reached.
    ``longest`` holds the longest such time of each stage so far; waiting for others does not count there.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.now = Position(STARTING, 0, clock())
        self.longest: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Mark a block of code as a stage."""
        before = self.now
        self._change(stage, before.waiting)
        try:
            yield
        finally:
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
        left, now = self.now, self._clock()
        if not left.waiting:
            self.longest[left.stage] = max(now - left.since, self.longest.get(left.stage, 0.0))
        self.now = Position(stage, left.step, now, waiting)
