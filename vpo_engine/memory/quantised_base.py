"""The frozen base under an adapter in 8 or 4 bits.

bitsandbytes quantises and dequantises. 8 bits: 255 equally spaced levels; 4 bits: the 16 levels of NF4 (QLoRA, arXiv
2305.14314). Each block of 64 neighbouring weights has a float32 scale, its largest magnitude. A layer dequantises its
weight when it runs, and once more in the backward pass, so that no dequantised weight is kept. bitsandbytes is imported
when the first layer is quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpo_engine.memory.rounding import is_kept_in_float32

BaseBits = Literal[8, 4]
BLOCK = 64
"""Weights that share a scale. Blocks are counted over the whole matrix, row by row, and may span rows."""
_DIRECT = (torch.float32, torch.bfloat16, torch.float16)
"""The types that bitsandbytes reads and writes; others are converted from and to float32."""


@dataclass(frozen=True)
class HeldBase:
    """The way in which a run holds the frozen base of its policy.

    bits: 8 or 4; None: as it is loaded. device: where layers are quantised and stay (None: where they are). keep: parts
    of module names; layers below such a module are never quantised.
    """

    bits: BaseBits | None = None
    device: torch.device | None = None
    keep: Collection[str] = ()

    def layers(self, network: nn.Module) -> list[str]:
        """Return the names of the linear layers that ``hold`` would quantise."""
        if self.bits is None:
            return []
        return [name for name in block_linears(network) if not set(name.split(".")) & set(self.keep)]

    def mapped(self, network: nn.Module) -> frozenset[str]:
        """Return the names of the weights that a loader had better not copy: ``hold`` reads them one after the other.

        Mapped from their file, they take no memory that the system cannot take back.
        """
        return frozenset(f"{name}.weight" for name in self.layers(network))

    @torch.no_grad()
    def hold(self, network: nn.Module) -> int:
        """Replace these layers by ``FrozenLinear``, one after the other, and return their number.

        Layers that were replaced before stay, so that a second call changes nothing. Raise ValueError, naming the
        layer, for weights that are not finite.
        """
        names = self.layers(network)
        for name in names:
            parent, _, child = name.rpartition(".")
            linear = network.get_submodule(name)
            assert self.bits is not None
            assert isinstance(linear, nn.Linear)
            setattr(network.get_submodule(parent), child, FrozenLinear(linear, self.bits, self.device, name))
            del linear  # else its weight would live until the next one has been read
        return len(names)


def block_linears(policy: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the transformer blocks, by name, without those of an adapter, those in few bits,
    and those that are kept in float32 beside bfloat16 weights.

    The blocks are the members of the network's own lists (nn.ModuleList), as in STDiT3 and in the transformers of
    diffusers. Embedders, the time projection and the final layer are not in blocks.
    """
    return {
        f"{outer}.{name}": module
        for outer, blocks in policy.named_children()
        if isinstance(blocks, nn.ModuleList)
        for name, module in blocks.named_modules()
        if type(module) is nn.Linear and ".lora_" not in name and not is_kept_in_float32(module.weight)
    }


def frozen_layers(network: nn.Module) -> list[FrozenLinear]:
    """Return the layers of a network that are held in 8 or 4 bits."""
    return [module for module in network.modules() if isinstance(module, FrozenLinear)]


def under_autocast(x: Tensor) -> bool:
    """Return whether products with x are computed in autocast's type; meta tensors have none."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class FrozenLinear(nn.Linear):
    """A linear layer [..., in] to [..., out] over a weight in 8 or 4 bits, which gets no gradient.

    weight: the codes, uint8: [blocks, 64] for 8 bits, [32 * blocks, 1] for 4, two codes a byte; zeros fill the last
    block. scales: float32 [blocks]. levels: float32 [256], which the codes number; None for 4 bits, whose levels
    bitsandbytes knows. They are buffers that no state dict has, and casts of the network to another type leave them
    alone. The bias stays as it is.

    The product is computed in the input's type, or in autocast's. It needs no kernel of its own: it is the ordinary
    product with the dequantised weight.
    """

    scales: Tensor
    levels: Tensor | None

    def __init__(
        self, linear: nn.Linear, bits: BaseBits, device: torch.device | None = None, name: str = "the layer"
    ) -> None:
        """Quantise ``linear``; ``name`` it in errors. On the meta device shapes are made alone."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        weight = linear.weight.detach().to(device)
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError(
                f"the weight of {name} has values that are not finite, so it cannot be held in {bits} bits; fetch the "
                "policy's files again, or leave out memory.base_bits"
            )
        tensors = encoded(weight, bits)
        for key, tensor in zip(("weight", "scales", "levels"), tensors, strict=True):
            self.register_buffer(key, tensor, persistent=False)
        self.bias = linear.bias

    @property
    def numel(self) -> int:
        """Return the number of weights that the codes stand for."""
        return self.in_features * self.out_features

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in ``dtype``: products of level and scale, rounded once."""
        direct = dtype if dtype in _DIRECT else torch.float32
        return decoded(
            self.weight, self.scales, self.levels, (self.out_features, self.in_features), direct
        ).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if under_autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self._product(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"

    def _product(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantised(x.dtype), bias)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Follow moves to another device, but keep the types of codes, scales and levels."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(function, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class _Product(torch.autograd.Function):
    """The product with a frozen weight, which is dequantised again for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def encoded(weight: Tensor, bits: BaseBits) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes, scales and levels of a matrix [out, in], as ``FrozenLinear`` has them; also on the meta device."""
    from bitsandbytes import functional as bnb

    blocks = -(-weight.numel() // BLOCK)
    if weight.is_meta:
        codes = weight.new_empty(
            (blocks, BLOCK) if bits == 8 else (blocks * BLOCK // 2, 1), dtype=torch.uint8
        )
        levels = weight.new_empty(256, dtype=torch.float32) if bits == 8 else None
        return codes, weight.new_empty(blocks, dtype=torch.float32), levels
    weight = weight if weight.dtype in _DIRECT else weight.float()
    weight = F.pad(weight.flatten(), (0, blocks * BLOCK - weight.numel())).view(blocks, BLOCK)
    if bits == 4:
        codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        return codes, state.absmax, None
    levels = bnb.create_linear_map(signed=True).to(weight.device)
    codes, state = bnb.quantize_blockwise(weight, code=levels, blocksize=BLOCK)
    return codes, state.absmax, levels


def decoded(
    codes: Tensor, scales: Tensor, levels: Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the rounded matrix [out, in] that ``encoded`` was given; it has registered bitsandbytes' operators."""
    if levels is not None:
        weight = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, levels, BLOCK, dtype)
    else:
        # One block a row: on CPUs with AVX-512 bitsandbytes 0.50.2 begins a new block with every row of this shape,
        # although its own quantisation lets blocks run on into the next row, and takes wrong scales then.
        rows = (len(scales), BLOCK)
        weight = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", rows, dtype)
    return weight.flatten()[: math.prod(shape)].view(shape)
