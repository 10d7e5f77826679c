"""Seconds and peak memory of a step's stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Stages:
    """What each stage of one step took on one device. Stages may come again, and do not nest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds to ``seconds[stage]``; on CUDA its kernels are waited for, and the most that tensors took is kept."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
            self._peaks[stage] = max(peak, self._peaks.get(stage, 0))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def peaks(self) -> dict[str, float]:
        """{"memory/STAGE": GiB that tensors took at most}, to be held against the plan; empty on a CPU."""
        return {f"memory/{stage}": peak / GIB for stage, peak in self._peaks.items()}
