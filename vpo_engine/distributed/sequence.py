"""Sequence parallelism: the processes of a group hold slices of the same videos' tokens, and exchange them.

A network takes whole latents and returns a whole prediction in every process; in between a process computes on its
slice. So the gradients of a process are those of its slice, and their sum over the group is the gradient. Slices are
as equal as their number allows: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vpo_engine.distributed.processes import Processes


class SequenceGroup:
    """The processes that hold slices of the same tokens, and this process among them.

    Every process of the group must make the same calls in the same order; a backward pass makes them, too. Tensors
    without values are not exchanged, so a step can be planned without the other processes. A copy of a network belongs
    to the same group. connected: whether the other processes are there. sent: the bytes that this process has sent to
    others of the group (``sequence_traffic`` has the formulas).
    """

    def __init__(self, processes: Processes, connected: bool = True) -> None:
        self._processes, self.connected = processes, connected
        self.rank, self.count = processes.rank, processes.count
        self.sent = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        return self

    def sizes(self, total: int) -> list[int]:
        """Return how many of ``total`` items each process holds, in rank order."""
        bounds = [total * rank // self.count for rank in range(self.count + 1)]
        return [end - start for start, end in pairwise(bounds)]

    def check(self, **totals: int) -> None:
        """Raise ValueError if a process would get none of the items of a kind; ``totals``: their numbers by name."""
        for name, total in totals.items():
            if total < self.count:
                raise ValueError(
                    f"distributed.sequence_parallel={self.count} divides the {name.replace('_', ' ')} of a video among "
                    f"{self.count} processes, but there are {total}; set it to {total} or less"
                )

    def enter(self, x: Tensor) -> Tensor:
        """Return a whole tensor, of which each process takes slices. If it has a gradient, that is the sum of what all
        processes have computed of it, in every process."""
        if self.count == 1 or not x.requires_grad:
            return x
        entered: Tensor = _Enter.apply(x, self)
        return entered

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's slice of a whole tensor along ``dim``, a view."""
        if self.count == 1:
            return x
        return x.narrow(dim, x.shape[dim] * self.rank // self.count, self.sizes(x.shape[dim])[self.rank])

    def switch(
        self, x: Tensor, split: int, joined: int, split_sizes: Sequence[int], joined_sizes: Sequence[int]
    ) -> Tensor:
        """Exchange slices along ``joined`` for slices along ``split``, by one all-to-all.

        x has all of dimension ``split``, and this process's slice of ``joined``. The result has all of ``joined``, and
        this process's slice of ``split``. The sizes are those of the slices of each process, in rank order.
        """
        if self.count == 1:
            return x
        switched: Tensor = _Switch.apply(x, self, split, joined, split_sizes, joined_sizes)
        return switched

    def gather(self, x: Tensor, dim: int, total: int) -> Tensor:
        """Join the slices x along ``dim``, which has ``total`` items, in every process.

        What follows must be the same in every process, down to the loss: each gives its slice the gradient that it
        has computed for the whole, and nothing is added up.
        """
        if self.count == 1:
            return x
        whole: Tensor = _Gather.apply(x, self, dim, total)
        return whole

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums of ``values`` over the group, without a gradient."""
        return values if isinstance(values, FakeTensor) else self._processes.sum(values.clone())

    # --- what moves ----------------------------------------------------------------------------------------

    def exchange(
        self, x: Tensor, split: int, joined: int, split_sizes: Sequence[int], joined_sizes: Sequence[int]
    ) -> Tensor:
        """Do what ``switch`` does, without a gradient."""
        pieces = x.split(list(split_sizes), split)
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        own = list(pieces[self.rank].shape)
        shapes = [[*own[:joined], size, *own[joined + 1 :]] for size in joined_sizes]
        counts = [torch.Size(shape).numel() for shape in shapes]
        received = x.new_empty(sum(counts))
        if not isinstance(x, FakeTensor):
            self.sent += (sent.numel() - pieces[self.rank].numel()) * x.element_size()
            self._processes.exchange(received, sent, counts, [piece.numel() for piece in pieces])
        parts = [part.view(shape) for part, shape in zip(received.split(counts), shapes, strict=True)]
        return torch.cat(parts, joined)

    def join(self, x: Tensor, dim: int, total: int) -> Tensor:
        """Do what ``gather`` does, without a gradient."""
        sizes = self.sizes(total)
        rows = x.movedim(dim, 0)
        filled = F.pad(rows, [0, 0] * (x.dim() - 1) + [0, max(sizes) - len(rows)])
        if isinstance(x, FakeTensor):
            parts = filled.new_empty(self.count * max(sizes), *filled.shape[1:])
        else:
            self.sent += (self.count - 1) * filled.numel() * x.element_size()
            parts = self._processes.gather(filled)
        kept = [part[:size] for part, size in zip(parts.chunk(self.count), sizes, strict=True)]
        return torch.cat(kept).movedim(0, dim).contiguous()


def alone() -> SequenceGroup:
    """Return the group of a process that holds whole videos."""
    return SequenceGroup(Processes(0, 1, torch.device("cpu")))


def planned(count: int) -> SequenceGroup:
    """Return the process with the largest slices of a group whose other processes are not there, for a plan."""
    return SequenceGroup(Processes(count - 1, count, torch.device("cpu")), connected=False)


class _Switch(torch.autograd.Function):
    """``SequenceGroup.switch``; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, *how: Any) -> Tensor:
        ctx.group, ctx.how = group, how
        return group.exchange(x, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split, joined, split_sizes, joined_sizes = ctx.how
        return ctx.group.exchange(grad, joined, split, joined_sizes, split_sizes), *[None] * 5


class _Enter(torch.autograd.Function):
    """``SequenceGroup.enter``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.sum(grad.contiguous()), None


class _Gather(torch.autograd.Function):
    """``SequenceGroup.gather``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, dim: int, total: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.join(x, dim, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.own(grad, ctx.dim), None, None, None
