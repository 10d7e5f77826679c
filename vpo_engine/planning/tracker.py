"""Count what a program allocates and computes, operator by operator; on fake tensors, without running it.

A ``Tracker`` sees every operator below autograd. It follows storages from their first tensor to their release, and
adds up floating point operations and bytes read and written. Peaks are worked out afterwards, from the log of
allocations and releases, so that a storage may be told what it is (a gradient, say) after it was made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpo_engine.planning.fake_results import call
from vpo_engine.planning.flops import FLOPS, SCRATCH, WRITES_NOTHING

BLOCK = 512
"""The CUDA allocator rounds sizes up to a multiple of so many bytes (c10/cuda/CUDACachingAllocator: kMinBlockSize)."""

Peak = dict[str, int]
"""Bytes by category, at the moment when their sum is largest."""


@dataclass(eq=False)
class Phase:
    """A record of the time between two moments: events of the log from ``start`` to ``stop``, and sums over operators.

    flops: operations of those with a formula (matrix products, convolutions, attention). traffic: bytes that the others
    read and write. resident: storages that are live at the start.
    """

    start: int
    stop: int = 0
    flops: int = 0
    traffic: int = 0
    resident: frozenset[int] = frozenset()


@dataclass
class _Storage:
    size: int
    category: str


@dataclass
class _Log:
    storages: list[_Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    """The log, an entry for each event: number + 1 when a storage appears, -(number + 1) when it is freed."""


class Tracker(TorchDispatchMode):
    """Counts operators while its context is entered, inside of FakeTensorMode if there is one.

    ``answer`` is what a fake tensor's value is taken to be where the program asks for it (``float(loss)``,
    ``bool(mask.all())``); tensors with a known value give that. ``scratch``: count what GPU kernels take for
    themselves, too, under the category "workspace".
    """

    def __init__(self, answer: Callable[[], float] = lambda: 1.0, scratch: bool = False) -> None:
        super().__init__()
        self.answer = answer
        self._scratch = SCRATCH if scratch else {}
        self._log = _Log()
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._category = "other"
        self._phases: list[Phase] = []

    # --- what storages are ---------------------------------------------------------------------------------

    @contextmanager
    def making(self, category: str) -> Iterator[None]:
        """Give this category to storages that appear inside the context."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Give this category to the tensors' storages, from the beginning; unknown storages are live from now on."""
        for tensor in tensors:
            self._log.storages[self._follow(tensor)].category = category

    def resize(self, tensor: Tensor, size: int) -> None:
        """Let a tensor's storage take ``size`` bytes from the beginning, for encodings that the fake does not have."""
        self._log.storages[self._follow(tensor)].size = _rounded(size)

    def live(self, category: str | None = None) -> int:
        """Return the bytes that are live now, of one category or of all."""
        storages = (self._log.storages[number] for number in self._numbers.values())
        return sum(s.size for s in storages if category in (None, s.category))

    # --- phases --------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """Record the log and the sums inside the context."""
        phase = Phase(len(self._log.events), resident=frozenset(self._numbers.values()))
        self._phases.append(phase)
        try:
            yield phase
        finally:
            self._phases.remove(phase)
            phase.stop = len(self._log.events)

    def peak(self, phase: Phase, absent: frozenset[str] = frozenset()) -> Peak:
        """Return the bytes by category when their sum is largest in a phase, without the categories ``absent``."""
        storages = self._log.storages
        now: Peak = {}
        for number in phase.resident:
            storage = storages[number]
            if storage.category not in absent:
                now[storage.category] = now.get(storage.category, 0) + storage.size
        total = most = sum(now.values())
        peak = dict(now)
        rising = False
        for event in self._log.events[phase.start : phase.stop]:
            storage = storages[abs(event) - 1]
            if storage.category in absent:
                continue
            size = storage.size if event > 0 else -storage.size
            if size < 0 and rising:
                peak, rising = dict(now), False
            now[storage.category] = now.get(storage.category, 0) + size
            total += size
            if total > most:
                most, rising = total, True
        return {name: size for name, size in (now if rising else peak).items() if size}

    def peak_of(self, phase: Phase, category: str) -> int:
        """Return the most bytes of one category in a phase."""
        others = frozenset(storage.category for storage in self._log.storages) - {category}
        return sum(self.peak(phase, others).values())

    def height(self, phase: Phase) -> int:
        """Return how far the live bytes rise in a phase above those at its start."""
        now = most = 0
        for event in self._log.events[phase.start : phase.stop]:
            size = self._log.storages[abs(event) - 1].size
            now += size if event > 0 else -size
            most = max(most, now)
        return most

    def add(self, flops: int, traffic: int, transient: int) -> None:
        """Count work that is not run: operations, bytes, and memory that is taken and given back."""
        for phase in self._phases:
            phase.flops += flops
            phase.traffic += traffic
        self._borrow(transient, self._category)

    # --- counting ------------------------------------------------------------------------------------------

    def _follow(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._numbers.get(key)
        if number is None:
            number = len(self._log.storages)
            self._log.storages.append(_Storage(_rounded(storage.nbytes()), self._category))
            self._log.events.append(number + 1)
            self._numbers[key] = number
            self._references[key] = weakref.ref(storage, lambda _: self._release(key))
        return number

    def _release(self, key: int) -> None:
        number = self._numbers.pop(key)
        del self._references[key]
        self._log.events.append(-(number + 1))

    def _borrow(self, size: int, category: str) -> None:
        """Count memory that is taken and given back at once."""
        number = len(self._log.storages)
        self._log.storages.append(_Storage(_rounded(size), category))
        self._log.events += [number + 1, -(number + 1)]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._value(args[0])
        result = call(function, args, kwargs)
        for tensor in _tensors(result):
            self._follow(tensor)
        self._count(function, args, kwargs, result)
        return result

    def _value(self, tensor: Tensor) -> Any:
        known = getattr(tensor, "constant", None)
        if known is not None:
            return known.item()
        if type(tensor) is Tensor:
            return tensor.item()
        value = self.answer()
        return (
            bool(value) if tensor.dtype == torch.bool else value if tensor.is_floating_point() else int(value)
        )

    def _count(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        packet = function._overloadpacket
        scratch = self._scratch.get(packet)
        if scratch is not None:
            self._borrow(scratch(*args, **kwargs), "workspace")
        if not self._phases:
            return
        formula = FLOPS.get(packet)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            for phase in self._phases:
                phase.flops += flops
        elif not function.is_view and packet not in WRITES_NOTHING:
            touched = (*_tensors(args), *_tensors(tuple(kwargs.values())), *_tensors(result))
            traffic = sum(tensor.numel() * tensor.element_size() for tensor in touched)
            for phase in self._phases:
                phase.traffic += traffic


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an operator's arguments or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
