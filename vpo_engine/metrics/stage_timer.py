"""Seconds and peak memory of a step's stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from vpo_engine.distributed.stages import Stages

GIB = 2**30
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class StageTimer:
    """Measure what each stage of a step takes on one device.

    A stage may be entered several times; its seconds add up. A stage that is entered inside another one is taken out
    of the outer one's seconds, so that the sum over all stages is time that passed once. Only the thread that made the
    timer is measured: what other threads do meanwhile is hidden behind it.
    """

    def __init__(self, device: torch.device, stages: Stages | None = None) -> None:
        """``stages``: is told of every stage, too."""
        self._device, self._stages = device, stages or Stages()
        self._thread = threading.get_ident()
        self._entered: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure a block of code. On CUDA its kernels are waited for, and the peak of allocated memory is kept."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._stop_clock()
        self._entered.append(stage)
        with self._stages(stage):
            try:
                yield
            finally:
                self._stop_clock()
                self._entered.pop()

    def timed(self, stage: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return ``function``, measured as a stage at every call."""

        def measured(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self(stage):
                return function(*args, **kwargs)

        return measured

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return what was measured since the last call, and begin anew.

        First {stage: seconds}, then {"memory/STAGE": GiB that tensors took at most}, which is empty on a CPU.
        """
        seconds, peaks = self._seconds, self._peaks
        self._seconds, self._peaks = {}, {}
        return seconds, {f"memory/{stage}": peak / GIB for stage, peak in peaks.items()}

    def _stop_clock(self) -> None:
        """Count the time since the last call for the innermost stage, if one is entered."""
        on_gpu = self._device.type == "cuda"
        if on_gpu and self._entered:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._entered:
            stage = self._entered[-1]
            self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
            if on_gpu:
                peak = torch.cuda.max_memory_allocated(self._device)
                self._peaks[stage] = max(peak, self._peaks.get(stage, 0))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = now
