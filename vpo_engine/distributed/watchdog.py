"""A watchdog in each process: it ends the run when a stage takes longer than its limit, and says who hangs where.

Each process tells the others through the store of the process group where it is. So one that waits can say for whom,
and notices a process that is silent because it is stopped, or because its machine is gone.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Literal

import torch.distributed as dist

from vpo_engine.distributed.board import NOTICE, Board, Word
from vpo_engine.distributed.machine import place
from vpo_engine.distributed.stages import STARTING, Stages

EXIT_CODE = 124
"""The exit code of a process that the watchdog ends; timeout(1) has the same."""
LEAST_MINUTES, TIMES_LONGEST = 30.0, 10.0
"""With stage_minutes=auto, a stage may take so many times its longest time so far, and at least so many minutes."""
FIRST_MINUTES = 180.0
"""With stage_minutes=auto, the minutes that a stage may take at least until it has ended for the first time. What it
reaches on the way (passes of the network, batches of videos that are decoded or scored, micro-batches) takes far less
on every GPU, also where something is compiled or loaded first."""
_GROUP_LIMIT = timedelta(hours=24)
_PARTING = 5.0
"""Seconds to wait for the thread at the end; the store may be on a machine that is gone."""
_NAMED = 3
"""Processes that a message names beside its own."""

StageMinutes = float | Literal["auto"] | None


def group_limit(minutes: StageMinutes) -> timedelta:
    """Return the time limit of collective operations: longer than the watchdog's, and than any stage of a healthy run,
    in which fast processes wait for slow ones."""
    return (
        _GROUP_LIMIT if not isinstance(minutes, float) else max(_GROUP_LIMIT, timedelta(minutes=2 * minutes))
    )


class LimitRule:
    """The seconds that a stage may take; ``minutes`` is distributed.stage_minutes."""

    def __init__(self, minutes: StageMinutes, stages: Stages) -> None:
        self._minutes, self._stages = minutes, stages

    def of(self, stage: str) -> float | None:
        """Return the limit of a stage; None: it has none, as what comes before the first stage."""
        if stage == STARTING:
            return None
        if isinstance(self._minutes, float):
            return 60 * self._minutes
        if self._minutes is None:
            return None
        longest = TIMES_LONGEST * self._stages.longest.get(stage, 0.0)
        return max(60 * (LEAST_MINUTES if stage in self._stages.ended else FIRST_MINUTES), longest)

    def together(self) -> float:
        """Return the limit of silence, and of an operation in which every process waits and none works."""
        return 60 * (self._minutes if isinstance(self._minutes, float) else LEAST_MINUTES)


class Watchdog:
    """Looks at this process's ``stages`` in a thread, inside of a ``with`` block.

    end: is called in that thread, once, with the line that says why the run ends; it must end the process.
    """

    def __init__(
        self,
        stages: Stages,
        minutes: StageMinutes,
        end: Callable[[str], None],
        *,
        rank: int = 0,
        count: int = 1,
        store: dist.Store | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``store``: reaches all ``count`` processes; None if there is one."""
        self._stages, self._end, self._clock = stages, end, clock
        self._rank, self._count, self._host, self._place = rank, count, socket.gethostname(), place()
        self._rule = LimitRule(minutes, stages)
        self._interval = 1.0 + count / 32  # with many processes the store would have much to do
        if isinstance(minutes, float):
            self._interval = min(self._interval, 60 * minutes / 10)
        self._board = None if store is None or minutes is None else Board(store, rank, count, clock)
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = (
            None if minutes is None else threading.Thread(target=self._run, name="vpo-watchdog", daemon=True)
        )

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(_PARTING)
            if self._board is not None and kind is None and not self._thread.is_alive():
                self._board.leave()

    def look(self) -> str | None:
        """Tell the others where this process is; return why the run has to end, or None."""
        now = self._stages.now
        limit = self._rule.of(now.stage)
        own = Word(
            self._rank,
            self._host,
            now.stage,
            now.step,
            now.waiting,
            self._clock() - self._stages.since,
            limit,
            os.getpid(),
            self._place,
        )
        others = [] if self._board is None else self._board.exchange(own)
        if self._board is not None and (lost := self._board.lost(self._place)) is not None:
            return f"{lost}; {own}"
        if not now.waiting:
            return f"{own}, longer than its limit of {limit:.0f} s{_named(others)}" if _over(own) else None
        return self._blame(own, others)

    def _blame(self, own: Word, others: list[Word]) -> str | None:
        """Return why the run has to end while this process waits: another one hangs, or all wait for each other."""
        limit, grace = self._rule.together(), 2 * self._interval
        for other in others:
            if other.silent > limit + grace:
                where = f"it was in {other.stage} of step {other.step}"
                return f"rank {other.rank} on {other.host} has said nothing for {other.silent:.0f} s ({where}); {own}"
            if not other.waiting and _over(other, grace):
                return f"{other}, longer than its limit of {other.limit:.0f} s; {own}"
        everyone = [own, *others]
        fresh = max(NOTICE, grace)  # many processes speak less often
        if len(everyone) < self._count or not all(word.waiting and word.silent < fresh for word in everyone):
            return None
        if min(word.seconds for word in everyone) > limit:
            return f"all processes wait for each other and none works: {own}{_named(others)}"
        return None

    def _run(self) -> None:
        """Look at once, so that the others know of this process before anything happens to it, and then repeatedly."""
        while not self._leaving.is_set():
            if (reason := self.look()) is not None:
                self._end(f"{reason}. The run ends; the same command goes on from its newest checkpoint")
                return
            self._leaving.wait(self._interval)


def _over(word: Word, grace: float = 0.0) -> bool:
    """Return whether a process has been in its stage for longer than its limit and ``grace`` seconds."""
    return word.limit is not None and word.seconds > word.limit + grace


def _named(others: list[Word]) -> str:
    """Return where the others are, those first that are furthest behind."""
    behind = sorted(others, key=lambda word: (word.waiting, word.step, -word.seconds))[:_NAMED]
    return "".join(f"; {word}" for word in behind)
