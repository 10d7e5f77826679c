"""One block of STDiT3 with inputs, and counters of the memory and arithmetic that it needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from vpo_kernels.attention import TextPlan, plan_text

from vpo_engine.config import ActivationCheckpointing
from vpo_engine.memory.checkpointing import checkpointed
from vpo_engine.models.opensora.blocks import Block, rotary_tables

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flops() -> FlopCounterMode:
    """Counts the CPU's attention as torch counts the GPU's: two products forward, five backward."""
    mapping = {
        FLASH: lambda q, k, v, *_, **__: 2 * 2 * math.prod(q) * k[-2],
        FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: 5 * 2 * math.prod(q) * k[-2],
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


@dataclass
class Case:
    """One block with its inputs."""

    temporal: bool
    B: int = 2
    T: int = 3
    S: int = 20
    C: int = 32
    H: int = 4
    lengths: tuple[int, ...] = (5, 5)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.N, self.L, self.M = self.B * self.T * self.S, sum(self.lengths), 4 * self.C
        place: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.block = Block(self.C, self.H, self.M, self.temporal).to(**place)
        shape = (self.B, self.T, self.S, self.C)
        self.x = torch.randn(shape).to(**place).requires_grad_()
        self.text = torch.randn(self.L, self.C).to(**place).requires_grad_()
        self.time = torch.randn(self.B, 1, 6, self.C).to(**place).requires_grad_()
        frequencies = 1.0 / 10000 ** (torch.arange(0, self.C // self.H, 2) / (self.C // self.H))
        self.rope = rotary_tables(frequencies.to(self.device), self.T, self.dtype)
        self.plan: TextPlan = plan_text(
            self.lengths,
            queries=self.T * self.S,
            device=self.x.device,
            dtype=self.dtype,
            head_dim=self.C // self.H,
        )

    @property
    def attended(self) -> int:
        """Pairs of a query and a key: within a frame or along time, and between video and text."""
        own = self.T if self.temporal else self.S
        return self.N * own + self.T * self.S * self.L

    def forward(self, checkpointing: ActivationCheckpointing, parts: int = 1) -> Tensor:
        inputs = (self.x, self.text, self.plan, self.time, self.rope, parts)
        return checkpointed(self.block, *inputs, checkpointing=checkpointing)

    def outcome(self, checkpointing: ActivationCheckpointing, parts: int = 1) -> list[Tensor]:
        """Prediction and gradients."""
        out = self.forward(checkpointing, parts)
        out.square().sum().backward()
        return [out.detach(), *self.gradients()]

    def shared(self) -> list[Tensor]:
        """Return the tensors that exist in any case: the input, and what all blocks share."""
        return [self.x, self.text, self.time, *self.rope, *self.block.parameters()]

    def gradients(self) -> list[Tensor]:
        wanted = [self.x, self.text, self.time, *self.block.parameters()]
        found = []
        for tensor in wanted:
            assert tensor.grad is not None
            found.append(tensor.grad)
            tensor.grad = None
        return found


class Storages(TorchDispatchMode):
    """Every storage that operators make, but those of ``besides``: which are still there, and the most ever."""

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in besides}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.most: Counter[int] = Counter()
        """By size in bytes, how many storages of it there were at once."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        sizes = [size for _, size in self._made.values()]
        self.peak = max(self.peak, sum(sizes))
        self.most |= Counter(sizes)
        return out

    def alive(self, besides: Iterable[Tensor] = ()) -> int:
        """Bytes, each storage once."""
        known = {tensor.untyped_storage()._cdata for tensor in besides}
        held = {key: size for key, (ref, size) in self._made.items() if not ref.expired()}
        return sum(size for key, size in held.items() if key not in known)
