"""Offload the inputs of checkpointed blocks to host memory between the forward and the backward pass.

A checkpointed block keeps its input for the backward pass. Here a separate stream copies that input to pinned host
memory while the block computes, and copies it back while the backward pass works on the following block.

    forward   on the device: the input of the running block, which is copied to the host at the same time
    backward  on the device: the input of the running block, and that of the block before it, which is being copied back
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
    """Copies between a device and its host, done in order and concurrently with the device's other work."""

    def host_like(self, tensor: Tensor) -> Tensor:
        """Allocate uninitialised host memory for a tensor of this size, layout and dtype."""
        ...

    def to_host(self, source: Tensor, host: Tensor) -> Any:
        """Begin to copy; return a mark for ``wait``. The source must be kept until then."""
        ...

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy into new device memory; return it with a mark to ``wait`` for before it is read or freed."""
        ...

    def wait(self, mark: Any) -> None:
        """Make the device's later work wait for the copy. The host does not wait."""
        ...


class PlainCopies:
    """Copies that are complete when the call returns, for CPU tensors and for tensors without data."""

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

    Device memory is allocated on the computing stream. So memory that is freed after ``wait`` can be reused in the
    order of that stream, without waiting for the device.
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
    """Return the kind of copies for a tensor's device; a tensor without data is copied at once."""
    if tensor.is_cuda and not isinstance(tensor, FakeTensor):
        return StreamCopies(tensor.device)
    return PlainCopies(tensor.device)


class _Input:
    """The input of one block, always kept on the host and at times on the device. Its host memory is reused."""

    def __init__(
        self, device: Tensor, host: Tensor, copies: Copies, free_hosts: list[Tensor], previous: _Input | None
    ) -> None:
        self._host, self._copies, self._free_hosts = host, copies, free_hosts
        self._previous = None if previous is None else weakref.ref(previous)
        self._device: Tensor | None = device
        self._mark = copies.to_host(device, host)

    def prefetch(self) -> None:
        """Begin to copy to the device, unless it is there already."""
        if self._device is None:
            self._device, self._mark = self._copies.to_device(self._host)

    def release(self) -> Tensor | None:
        """Give up the device's copy, and return it if there is one."""
        tensor, self._device = self._device, None
        if tensor is not None:
            self._copies.wait(self._mark)
        return tensor

    def fetch(self) -> Tensor:
        """Return the device's copy, and begin to load the input of the block before this one."""
        self.prefetch()
        tensor = self.release()
        assert tensor is not None
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.prefetch()
        return tensor

    def __del__(self) -> None:
        self.release()
        self._free_hosts.append(self._host)


class OffloadedInputs:
    """Host memory for the inputs of a network's blocks, reused from step to step. A copy has its own memory.

    Several forward passes may run before their backward passes, which may come in any order. Only the autograd graph
    keeps an input alive: memory is free again once the graph drops the input, after a backward pass or an error.
    """

    def __init__(self, make_copies: Callable[[Tensor], Copies] = copies_for) -> None:
        self._make_copies = make_copies
        self._copies: dict[torch.device, Copies] = {}
        self._free_hosts: dict[Hashable, list[Tensor]] = {}
        self._newest: weakref.ref[_Input] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedInputs:
        return OffloadedInputs(self._make_copies)

    def forward_pass(self) -> ForwardPass:
        """Begin a forward pass; use the result for its blocks, in their order."""
        return ForwardPass(self)

    def send(self, tensor: Tensor, previous: _Input | None) -> _Input:
        newest = None if self._newest is None else self._newest()
        if newest is not None:
            newest.release()
        if tensor.device not in self._copies:
            self._copies[tensor.device] = self._make_copies(tensor)
        copies = self._copies[tensor.device]
        free_hosts = self._free_hosts.setdefault(
            (tensor.shape, tensor.stride(), tensor.dtype, tensor.device), []
        )
        host = free_hosts.pop() if free_hosts else copies.host_like(tensor)
        sent = _Input(tensor, host, copies, free_hosts, previous)
        self._newest = weakref.ref(sent)
        return sent


class ForwardPass:
    """The block inputs of one forward pass. Each knows the one before it, which is needed next in the backward pass."""

    def __init__(self, store: OffloadedInputs) -> None:
        self._store = store
        self._last: weakref.ref[_Input] | None = None

    def sending(self, x: Tensor) -> AbstractContextManager[Any]:
        """Return a context in which autograd saves x on the host and everything else where it is.

        Use it around one checkpointed block whose input is x.
        """

        known = _identity(x)  # not x itself: autograd keeps the hooks, and so x, as long as what they packed

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
    """Return a key that tells tensors apart, even those without data."""
    return tensor.untyped_storage()._cdata, tensor.shape
