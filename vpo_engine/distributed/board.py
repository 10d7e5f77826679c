"""The board of a run: where each process leaves word of what it does, in the store of the process group."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from vpo_engine.distributed.machine import is_running

NOTICE = 10.0
"""Seconds for a process to notice by itself that another one is gone; a word that is older is not fresh."""
_LOST, _LEFT = "lost", "left"
"""Keys: what is said of a process that was lost; and, with its rank, that a process took its leave."""


@dataclass(frozen=True)
class Word:
    """The report of a process: where it is, for how many seconds, and how many it may be there. silent: seconds
    since it said so."""

    rank: int
    host: str
    stage: str
    step: int
    waiting: bool
    seconds: float
    limit: float | None
    pid: int = 0
    place: str | None = None
    number: int = 0
    silent: float = 0.0

    @property
    def fresh(self) -> bool:
        """Return whether the process said this a moment ago."""
        return self.silent < NOTICE

    def __str__(self) -> str:
        doing = f"waits for other processes in {self.stage}" if self.waiting else f"is in {self.stage}"
        since = "" if self.fresh else f" (silent for {self.silent:.0f} s)"
        return f"rank {self.rank} on {self.host} {doing} of step {self.step} for {self.seconds:.0f} s{since}"


class Board:
    """The words of all processes of a run. If the store is gone, with the process or the machine that held it, nothing
    new is learnt, and the operations of the process group will fail."""

    def __init__(self, store: dist.Store, rank: int, count: int, clock: Callable[[], float]) -> None:
        own = store.clone()  # type: ignore[attr-defined]  # another thread may wait in the original
        self._store: dist.Store | None = dist.PrefixStore("stages", own)
        self._rank, self._clock = rank, clock
        self._others = [other for other in range(count) if other != rank]
        self._number = 0
        self._seen: dict[int, tuple[Word, float]] = {}
        self._gone: dict[int, float] = {}

    def exchange(self, own: Word) -> list[Word]:
        """Leave this process's word, and return those of the others, with their seconds until now."""
        self._number += 1
        self._set(str(self._rank), json.dumps(asdict(own) | {"number": self._number}))
        for rank in self._others:
            if (text := self._get(str(rank))) is None:
                continue
            word = Word(**json.loads(text))
            if rank not in self._seen or self._seen[rank][0].number != word.number:
                self._seen[rank] = word, self._clock()
        now = self._clock()
        return [
            replace(word, seconds=word.seconds + now - at, silent=now - at)
            for word, at in self._seen.values()
        ]

    def lost(self, here: str | None) -> str | None:
        """Return what is said of a process that has ended without taking leave; None while there is none.

        A process sees those of its own place, ``here``, and tells all others. First they get time to notice themselves.
        """
        now = self._clock()
        for rank, (word, _) in self._seen.items():
            if here is not None and word.place == here and not is_running(word.pid):
                self._gone.setdefault(rank, now)
        for rank, since in self._gone.items():
            if now - since > NOTICE and self._get(f"{_LEFT} {rank}") is None:
                word = self._seen[rank][0]
                where = f"it was in {word.stage} of step {word.step}"
                self._set(_LOST, f"rank {rank} on {word.host} (process {word.pid}) has ended; {where}")
        return self._get(_LOST)

    def leave(self) -> None:
        """Tell the others that this process ends, and that nobody need wait for it."""
        self._set(f"{_LEFT} {self._rank}", "now")

    def _set(self, key: str, text: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, text)
            except RuntimeError:
                self._store = None

    def _get(self, key: str) -> str | None:
        """Return what is under ``key``; None if there is nothing."""
        if self._store is None:
            return None
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            self._store = None
            return None
