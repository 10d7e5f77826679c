"""Copies of a run's state in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_SLAB_BYTES = 2**28
"""Pinned memory is allocated in powers of two, so tensors share allocations of this size."""
_ALIGNMENT = 256
"""Each copy begins at a multiple of this many bytes."""


class HostCopies:
    """Copies of tensors and networks in host memory, which is pinned where they come from a GPU.

    The memory is kept: after ``begin`` it is used again, so copies that were made before must not be in use any more.
    A copy is complete after ``wait``.
    """

    def __init__(self, device: torch.device) -> None:
        """``device``: the device that the run computes on; its tensors may be on the host too."""
        self._device = device
        self._slabs: list[Tensor] = []
        self._slab, self._used = 0, 0

    def begin(self) -> None:
        """Give all memory back for new copies."""
        self._slab, self._used = 0, 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of host memory that are kept."""
        return sum(slab.numel() for slab in self._slabs)

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor of any device, shape and dtype; it shares no memory with others."""
        source = tensor.detach()
        if source.numel() == 0:
            return torch.empty(source.shape, dtype=source.dtype)
        place = self._place(source.numel() * source.element_size())
        made = place.view(source.dtype).view(source.shape)
        return made.copy_(source, non_blocking=source.is_cuda)

    def tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return copies of {group: {name: tensor}}."""
        return {
            group: {name: self.tensor(value) for name, value in members.items()}
            for group, members in groups.items()
        }

    def network(self, network: nn.Module) -> nn.Module:
        """Return a copy of a network in evaluation mode whose trained parameters are on the host.

        Other parameters and buffers do not change, and are shared. So are modules without a trained parameter: under an
        adapter this is nearly the whole network.
        """
        memo: dict[int, object] = {id(fixed): fixed for fixed in (*network.parameters(), *network.buffers())}
        for module in network.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                memo[id(module)] = module
        for parameter in network.parameters():
            if parameter.requires_grad:
                memo[id(parameter)] = nn.Parameter(self.tensor(parameter), requires_grad=False)
        return copy.deepcopy(network, memo)

    def wait(self) -> None:
        """Wait until every copy is complete."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _place(self, nbytes: int) -> Tensor:
        """Return the next ``nbytes`` bytes, uint8 [nbytes], of the slabs that are there, or of a new one."""
        while self._slab < len(self._slabs):
            slab = self._slabs[self._slab]
            if self._used + nbytes <= slab.numel():
                place = slab[self._used : self._used + nbytes]
                self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
                return place
            self._slab, self._used = self._slab + 1, 0
        pinned = self._device.type == "cuda"
        self._slabs.append(torch.empty(max(nbytes, _SLAB_BYTES), dtype=torch.uint8, pin_memory=pinned))
        return self._place(nbytes)
