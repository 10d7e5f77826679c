"""bfloat16 weights: round a network's weights to them, and round float32 weights stochastically without bias."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from vpo_engine.seeding import generator

_LOW_BITS = 16
"""Bits of a float32 below the last bit of a bfloat16."""
_LARGEST = 0x7F7F0000
"""The largest finite bfloat16, as the bits of a float32."""
_UNROUNDED = "unrounded"
_KEPT = "kept_in_float32"


@torch.no_grad()
def hold_in_bfloat16(
    network: nn.Module,
    weights: Literal["float32", "fp32_master", "stochastic_rounding"],
    dtype: torch.dtype,
    float32_modules: Collection[str] = (),
) -> None:
    """Round the parameters of a loaded network to the nearest bfloat16 values, and store them in ``dtype``.

    ``dtype`` is bfloat16 or float32. Buffers are not changed, and with weights float32 nothing is. With fp32_master,
    each trained parameter keeps its unrounded float32 weight until the optimizer takes it (see ``take_unrounded``);
    copies of the network do not have it. Parameters with one of ``float32_modules`` in their path are not rounded and
    are stored in float32; ``is_kept_in_float32`` tells them. A second call changes nothing.
    """
    if weights == "float32":
        return
    for name, parameter in network.named_parameters():
        unrounded = parameter.data
        if not set(name.split(".")).isdisjoint(float32_modules):
            parameter.data = unrounded.float()
            setattr(parameter, _KEPT, True)
            continue
        if weights == "fp32_master" and parameter.requires_grad and not hasattr(parameter, _UNROUNDED):
            setattr(parameter, _UNROUNDED, unrounded.float())
        parameter.data = unrounded.to(torch.bfloat16, copy=True).to(dtype)


def is_kept_in_float32(parameter: Tensor) -> bool:
    """Return whether ``hold_in_bfloat16`` has left this parameter unrounded because its module must stay float32."""
    return getattr(parameter, _KEPT, False)


def take_unrounded(parameter: nn.Parameter) -> Tensor:
    """Return and forget a parameter's float32 weight from before ``hold_in_bfloat16``.

    If there is none, return a float32 copy of the parameter.
    """
    unrounded: Tensor | None = parameter.__dict__.pop(_UNROUNDED, None)
    if unrounded is None:
        return parameter.detach().to(torch.float32, copy=True)
    return unrounded.to(parameter.device)


def rounding_offsets(like: Tensor, seed: int, step: int, number: int) -> Tensor:
    """Draw uniform int32 values in [0, 2^16) of ``like``'s shape and device.

    They depend on seed, step and number alone: they are the same on every CPU, and the same on GPUs of one kind.
    """
    key = generator(seed, "rounding", step, number).initial_seed()
    random = torch.Generator(like.device).manual_seed(key)
    return torch.randint(1 << _LOW_BITS, like.shape, dtype=torch.int32, device=like.device, generator=random)


def round_stochastically(values: Tensor, offsets: Tensor) -> Tensor:
    """Round float32 ``values`` to one of their two neighbouring bfloat16 values, chosen by the offset; keep float32.

    offsets: int32 in [0, 2^16), of the same shape. They are overwritten, and the result uses their memory. If a value
    lies a fraction q of the way from the neighbour nearer zero to the other one, then 2^16 q of the 2^16 offsets round
    it to the other one. So the mean over uniform offsets is the value itself, for subnormal numbers too. bfloat16
    values, infinities and NaN are not changed; finite values beyond the largest finite bfloat16 become that.
    """
    bits = values.view(torch.int32)
    offsets.mul_(bits.bitwise_and(0x7FFFFFFF) < _LARGEST)
    rounded = offsets.add_(bits).bitwise_and_(-1 << _LOW_BITS).view(torch.float32)
    return rounded.masked_fill_(values.isnan(), torch.nan)
