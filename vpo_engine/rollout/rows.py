"""How many rows go through a network at once: planned in groups, halved once where memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """Candidates that are computed together: some prompts (with equally many candidates each), some candidates."""

    prompts: range
    candidates: range

    def __len__(self) -> int:
        return len(self.prompts) * len(self.candidates)

    def split(self, rows: int | None) -> list[Group]:
        """Groups of at most ``rows`` rows (None: no limit), in order: of whole prompts, else even parts of one."""
        if rows is None or len(self) <= rows:
            return [self]
        each = len(self.candidates)
        if rows >= each:
            return [Group(part, self.candidates) for part in _chunks(self.prompts, rows // each)]
        parts = -(-each // rows)
        return [
            Group(self.prompts[number : number + 1], part)
            for number in range(len(self.prompts))
            for part in _chunks(self.candidates, -(-each // parts))
        ]


class Rows:
    """The limit of rows at once, for a whole run: work that does not fit is done again with half of them, once.

    What is computed does not depend on it beyond the batch dependence of the matrix products. Several threads may
    ``run`` at the same time.
    """

    def __init__(self, limit: int | None, say: Callable[[str], None] = print) -> None:
        self.limit = limit
        self._say = say
        self._halved = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Group], Result], prompts: int, candidates: int) -> Iterator[Result]:
        """``work`` of every group, in order. torch.OutOfMemoryError, naming rollout.rows, if half do not fit either."""
        waiting = [Group(range(prompts), range(candidates))]
        while waiting:
            group, *waiting = waiting
            parts = group.split(self.limit)
            if len(parts) > 1:
                waiting = parts + waiting
                continue
            try:
                result = work(group)
            except torch.OutOfMemoryError as error:
                with self._lock:
                    if self.limit is None or len(group) <= self.limit:  # else another thread has halved it
                        self._halve(len(group), error)
                waiting.insert(0, group)
            else:
                yield result
                del result

    def _halve(self, rows: int, error: torch.OutOfMemoryError) -> None:
        if self._halved or rows == 1:
            raise torch.OutOfMemoryError(
                f"{rows} rows at once do not fit in the memory of the device either; set rollout.rows to "
                f"{max(1, rows // 2)}, or let the model share the device less (memory.residency=phases): {error}"
            ) from error
        self._halved, self.limit = True, rows // 2
        # The frames of the failed work hold what it had computed.
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._say(
            f"out of memory with {rows} rows at once: going on with {self.limit}, with the same samples; set "
            f"rollout.rows={self.limit} to start so"
        )


def _chunks(values: range, size: int) -> list[range]:
    return [values[start : start + size] for start in range(0, len(values), size)]
