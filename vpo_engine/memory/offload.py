"""Inputs of blocks in host memory between the forward and the backward pass.

A checkpointed block keeps its input for the backward pass. Here that input goes to pinned host memory on a stream of
its own while the block computes, and comes back while the block after it is being differentiated.

    forward   device: input of the running block; its copy to the host runs beside the block
    backward  device: input of the running block, and that of the block before it on its way back
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Copies(Protocol):
    """Copies between a device and its host, in the order asked for, beside the device's other work."""

    def host_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised host memory for a tensor of this size, layout and dtype."""
        ...

    def to_host(self, source: Tensor, host: Tensor) -> Any:
        """Begin to copy; the mark to ``wait`` for. The source has to stay until then."""
        ...

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy into new device memory; the mark to ``wait`` for before that is read or let go."""
        ...

    def wait(self, mark: Any) -> None:
        """Have the device's later work wait for the copy; the host does not."""
        ...


class PlainCopies:
    """Copies that are done when the call returns: for CPU tensors, and for tensors without data."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu")

    def to_host(self, source: Tensor, host: Tensor) -> None:
        host.copy_(source)

    def to_device(self, host: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(host, device=self._device).copy_(host), None

    def wait(self, mark: None) -> None: ...


class StreamCopies:
    """Copies from and to pinned memory on a second CUDA stream.

    Device memory belongs to the stream that computes, so that its allocator may hand on what was let go after
    ``wait`` in that stream's order, without waiting for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)

    def to_host(self, source: Tensor, host: Tensor) -> torch.cuda.Event:
        return self._copy(source, host)

    def to_device(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        tensor = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self._device)
        return tensor, self._copy(host, tensor)

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


def copies_for(tensor: Tensor) -> Copies:
    """Those that fit a tensor's device; a tensor without data has no stream to run beside."""
    if tensor.is_cuda and not isinstance(tensor, FakeTensor):
        return StreamCopies(tensor.device)
    return PlainCopies(tensor.device)


class _Input:
    """One block's input: always on the host, at times on the device too. Its host memory outlives it, for reuse."""

    def __init__(
        self, device: Tensor, host: Tensor, copies: Copies, spare: list[Tensor], previous: _Input | None
    ) -> None:
        self._host, self._copies, self._spare = host, copies, spare
        self._previous = None if previous is None else weakref.ref(previous)
        self._device: Tensor | None = device
        self._mark = copies.to_host(device, host)

    def bring(self) -> None:
        """Begin to copy to the device, unless it is there."""
        if self._device is None:
            self._device, self._mark = self._copies.to_device(self._host)

    def let_go(self) -> Tensor | None:
        """The device's copy, if there is one, which is then the caller's."""
        tensor, self._device = self._device, None
        if tensor is not None:
            self._copies.wait(self._mark)
        return tensor

    def fetch(self) -> Tensor:
        """The device's copy for the caller; the input before this one is sent for."""
        self.bring()
        tensor = self.let_go()
        assert tensor is not None
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.bring()
        return tensor

    def __del__(self) -> None:
        self.let_go()
        self._spare.append(self._host)


class OffloadedInputs:
    """The host memory of a network's inputs of blocks, used again from step to step; a copy of this has its own.

    Forward passes may follow each other before their backward passes, in any order. Nothing here keeps an input
    alive: the graph does, and what it drops, by a backward pass or by an error, is free again.
    """

    def __init__(self, make_copies: Callable[[Tensor], Copies] = copies_for) -> None:
        self._make_copies = make_copies
        self._copies: dict[torch.device, Copies] = {}
        self._spare: dict[Hashable, list[Tensor]] = {}
        self._newest: weakref.ref[_Input] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedInputs:
        return OffloadedInputs(self._make_copies)

    def forward_pass(self) -> ForwardPass:
        """For the blocks of one forward pass, in their order."""
        return ForwardPass(self)

    def send(self, tensor: Tensor, previous: _Input | None) -> _Input:
        newest = None if self._newest is None else self._newest()
        if newest is not None:
            newest.let_go()
        if tensor.device not in self._copies:
            self._copies[tensor.device] = self._make_copies(tensor)
        copies = self._copies[tensor.device]
        spare = self._spare.setdefault((tensor.shape, tensor.stride(), tensor.dtype, tensor.device), [])
        host = spare.pop() if spare else copies.host_like(tensor)
        sent = _Input(tensor, host, copies, spare, previous)
        self._newest = weakref.ref(sent)
        return sent


class ForwardPass:
    """The inputs of one forward pass, each of which knows the one before it."""

    def __init__(self, store: OffloadedInputs) -> None:
        self._store = store
        self._last: weakref.ref[_Input] | None = None

    def sending(self, x: Tensor) -> AbstractContextManager[Any]:
        """In this context what autograd saves of x itself waits on the host; everything else stays where it is.

        To be put around one checkpointed block, whose input x is.
        """

        known = _identity(x)  # and not x: autograd keeps hooks as long as what they packed

        def pack(tensor: Tensor) -> Tensor | _Input:
            if _identity(tensor) != known:
                return tensor
            sent = self._store.send(tensor.detach(), None if self._last is None else self._last())
            self._last = weakref.ref(sent)
            return sent

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Tensor | _Input) -> Tensor:
    return packed.fetch() if isinstance(packed, _Input) else packed


def _identity(tensor: Tensor) -> tuple[int, torch.Size]:
    """What tells tensors apart, also those without data."""
    return tensor.untyped_storage()._cdata, tensor.shape
