"""bfloat16 weights: holding a network in them, and rounding float32 weights to them without bias."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vpo_engine.seeding import generator

_LOW_BITS = 16
"""What a float32 has below the last bit of a bfloat16."""
_LARGEST = 0x7F7F0000
"""The largest finite bfloat16, as the bits of a float32."""
_UNROUNDED = "unrounded"


@torch.no_grad()
def hold_in_bfloat16(
    network: nn.Module, weights: Literal["float32", "masters", "stochastic"], dtype: torch.dtype
) -> None:
    """Round all parameters of a loaded network to the nearest bfloat16 values, held in ``dtype`` from now on.

    dtype bfloat16 or float32. Buffers stay as they are, and with weights float32 so does everything. With masters,
    each trained parameter keeps its unrounded float32 weight at hand for the optimizer, which takes it over (see
    ``take_unrounded``); copies of the network do not have it. Doing this twice is doing it once.
    """
    if weights == "float32":
        return
    for parameter in network.parameters():
        unrounded = parameter.data
        if weights == "masters" and parameter.requires_grad and not hasattr(parameter, _UNROUNDED):
            setattr(parameter, _UNROUNDED, unrounded.float())
        parameter.data = unrounded.to(torch.bfloat16, copy=True).to(dtype)


def take_unrounded(parameter: nn.Parameter) -> Tensor:
    """Its float32 weight from before ``hold_in_bfloat16``, once; a float32 copy of what it is if there is none."""
    unrounded: Tensor | None = parameter.__dict__.pop(_UNROUNDED, None)
    if unrounded is None:
        return parameter.detach().to(torch.float32, copy=True)
    return unrounded.to(parameter.device)


def rounding_offsets(like: Tensor, seed: int, step: int, number: int) -> Tensor:
    """Uniform int32 in [0, 2^16), of ``like``'s shape and device: a function of seed, step and number alone.

    On the CPU the same everywhere; on CUDA the same on GPUs of one kind.
    """
    key = generator(seed, "rounding", step, number).initial_seed()
    random = torch.Generator(like.device).manual_seed(key)
    return torch.randint(1 << _LOW_BITS, like.shape, dtype=torch.int32, device=like.device, generator=random)


def round_stochastically(values: Tensor, offsets: Tensor) -> Tensor:
    """float32 ``values`` to bfloat16 values, still float32: one of the two neighbours, by the offset's choice.

    offsets: int32 in [0, 2^16), of the same shape; overwritten, the result lies in its memory. A value that is the
    share q of the way from the neighbour nearer zero to the other goes to the other for 2^16 q of the 2^16 offsets,
    so the mean over uniform offsets is the value itself, subnormal numbers included. Values on the grid, infinities
    and NaN stay; finite values beyond the largest finite bfloat16 become that.
    """
    bits = values.view(torch.int32)
    offsets.mul_(bits.bitwise_and(0x7FFFFFFF) < _LARGEST)
    rounded = offsets.add_(bits).bitwise_and_(-1 << _LOW_BITS).view(torch.float32)
    return rounded.masked_fill_(values.isnan(), torch.nan)
