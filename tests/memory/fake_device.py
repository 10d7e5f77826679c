"""A second region of CPU memory that is treated as a device."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor


class FakeDevice:
    """Counts moves, and the bytes that are live: what was loaded or found here and is not yet freed."""

    def __init__(self) -> None:
        self.loaded = self.stored = self.waits = self.peak = 0
        self.allocated: list[int] = []
        self._numbers = itertools.count()
        self._live: dict[int, tuple[int, int]] = {}

    def _count(self, tensor: Tensor) -> None:
        storage, number = tensor.untyped_storage(), next(self._numbers)
        self._live[number] = storage._cdata, storage.nbytes()
        weakref.finalize(storage, self._live.pop, number)
        self.peak = max(self.peak, self.live)

    @property
    def live(self) -> int:
        return sum(nbytes for _, nbytes in self._live.values())

    def has(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether all of them are on the device now."""
        here = {storage for storage, _ in self._live.values()}
        return all(tensor.untyped_storage()._cdata in here for tensor in tensors)

    def holds(self, tensor: Tensor) -> bool:
        self._count(tensor)
        return True

    def host(self, nbytes: int) -> Tensor:
        self.allocated.append(nbytes)
        return torch.full((nbytes,), 0xAB, dtype=torch.uint8)

    def load(self, host: Tensor) -> Tensor:
        assert host.dtype == torch.uint8
        self.loaded += host.numel()
        data = host.clone()
        self._count(data)
        return data

    def store(self, device: Tensor, host: Tensor) -> None:
        self.stored += device.numel()
        host.copy_(device)

    def wait(self) -> None:
        self.waits += 1
