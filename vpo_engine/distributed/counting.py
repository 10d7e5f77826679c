"""Count the bytes that a process sends in collective operations, by what they are for.

Counted is what each operation was given, DeepSpeed's operations included. What a process sends follows by the rule of
NCCL's ring algorithms: of R processes each sends (R - 1) / R of a tensor that is gathered or scattered, and twice that
of one that is reduced to all. Source: nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_TWICE = ("allreduce_", "allreduce_coalesced_")
_OUTPUT = ("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_", "allgather_coalesced_")
"""Operations whose first argument is what is gathered."""
_INPUT = (
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "alltoall_",
    "alltoall_base_",
)
"""Operations whose second argument is what is scattered."""
_ONCE = ("broadcast_", "reduce_")
"""Operations in which every process but one passes the tensor on."""


class CollectiveBytes(TorchDispatchMode):
    """Counts in this thread while its context is entered.

    sent: bytes that this process has sent, by what they are for. purpose: says that, of an operation's name in c10d.
    """

    def __init__(self, purpose: Callable[[str], str]) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self._purpose = purpose

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.partition("::")[2], args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        ranks = _size_of_group(args)
        if name == "barrier" or ranks == 1:
            return
        share = (ranks - 1) / ranks
        if name in _TWICE:
            sent = 2 * share * _nbytes(args[0])
        elif name in _OUTPUT or name in _ONCE:
            sent = share * _nbytes(args[0])
        else:
            assert name in _INPUT, f"no rule says what a process sends in c10d::{name}"
            sent = share * _nbytes(args[1])
        self.sent[self._purpose(name)] += sent


def _size_of_group(args: tuple[Any, ...]) -> int:
    """Return the number of processes of an operation, whose group is its first argument of a type of c10d's own."""
    group = next(value for value in args if isinstance(value, torch.ScriptObject))
    return int(dist.ProcessGroup.unbox(group).size())


def _nbytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_iter(value) if isinstance(leaf, Tensor))
