"""Batches of candidates that go through a network at once; their size is limited, and halved if memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Candidates that are computed together: the same range of candidates of each of a range of prompts."""

    prompts: range
    candidates: range

    def __len__(self) -> int:
        return len(self.prompts) * len(self.candidates)

    @property
    def index(self) -> tuple[slice, slice]:
        """Return the index of the batch's part in a tensor [P, N, ...]."""
        return as_slice(self.prompts), as_slice(self.candidates)

    def split(self, size: int | None) -> list[Batch]:
        """Split into batches of at most ``size`` candidates, in order; None sets no limit.

        A batch holds whole prompts where ``size`` allows it, else an even part of one prompt's candidates.
        """
        if size is None or len(self) <= size:
            return [self]
        each = len(self.candidates)
        if size >= each:
            return [Batch(part, self.candidates) for part in _chunks(self.prompts, size // each)]
        parts = -(-each // size)
        return [
            Batch(self.prompts[number : number + 1], part)
            for number in range(len(self.prompts))
            for part in _chunks(self.candidates, -(-each // parts))
        ]


class Batches:
    """Run work in batches of at most ``size`` candidates, for a whole training run.

    A batch that does not fit in the memory of the device is computed again in halves; this happens once in a run. The
    results do not depend on the size, but for the rounding of matrix products of other shapes. Several threads may
    call ``run`` at the same time.
    """

    def __init__(
        self,
        size: int | None,
        say: Callable[[str], None] = print,
        *,
        halved: bool = True,
        setting: str | None = "rollout.batch_size",
    ) -> None:
        """Set the limit; None computes all candidates of a step at once. ``say`` is told when the size is halved.

        ``halved``: whether a batch that does not fit is computed again in halves, which processes that compute it
        together cannot do: the others do not know of it. ``setting``: the name of what sets the size, for messages;
        None where nothing does.
        """
        self.size = size
        self._say, self._may_halve, self._setting = say, halved, setting
        self._halved = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Batch], Result], prompts: int, candidates: int) -> Iterator[Result]:
        """Yield the result of ``work`` for every batch of [prompts, candidates], in order.

        torch.OutOfMemoryError, naming the setting, if half of a batch does not fit either.
        """
        waiting = [Batch(range(prompts), range(candidates))]
        while waiting:
            batch, *waiting = waiting
            parts = batch.split(self.size)
            if len(parts) > 1:
                waiting = parts + waiting
                continue
            try:
                result = work(batch)
            except torch.OutOfMemoryError as error:
                with self._lock:
                    if (
                        self.size is None or len(batch) <= self.size
                    ):  # else another thread has halved it already
                        self._halve(len(batch), error)
                waiting.insert(0, batch)
            else:
                yield result
                del result

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        half = max(1, size // 2)
        if self._halved or size == 1 or not self._may_halve:
            setting = "" if self._setting is None else f"set {self._setting} to {half}, or "
            raise torch.OutOfMemoryError(
                f"a batch of {size} candidates does not fit in the memory of the device"
                f"{' either' if self._halved else ''}; {setting}let "
                f"the model share the device less (memory.offload_idle=true): {error}"
            ) from error
        self._halved, self.size = True, half
        # The frames of the failed work hold what it had computed.
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        setting = "" if self._setting is None else f"; set {self._setting}={half} to start so"
        self._say(
            f"out of memory with a batch of {size} candidates: going on with {half}, with the same samples{setting}"
        )


def as_slice(numbers: range) -> slice:
    """Return a range of step 1 as a slice."""
    return slice(numbers.start, numbers.stop)


def _chunks(values: range, size: int) -> list[range]:
    return [values[start : start + size] for start in range(0, len(values), size)]
