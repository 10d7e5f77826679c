"""Views of token tensors, attention heads and modulations in the few shapes that the Triton kernels take."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def promoted_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that a sum of these tensors would have."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def new_like(tensor: Tensor, dimensions: int = 4) -> Tensor:
    """Allocate a tensor of the same shape, dtype and order of dimensions in memory.

    The order is kept only if channels stay innermost and there are at most ``dimensions`` dimensions, so that
    ``as_tokens`` (4) or ``as_sequences`` (5) of the result is a view; else the result is contiguous.
    """
    out = torch.empty_like(tensor)
    keep = out.stride(-1) == 1 and out.ndim <= dimensions
    return out if keep else tensor.new_empty(tensor.shape)


class Tokens(NamedTuple):
    """Tensors [..., C] as [B, T, S, C]: token number i is (b, t, s) = (i // (T * S), i // S % T, i % S)."""

    frames: int  # T
    patches: int  # S
    total: int  # B * T * S
    tensors: list[Tensor]  # each [B, T, S, C], channels at stride 1


def as_tokens(*tensors: Tensor) -> Tokens:
    """View equally shaped tensors [..., C] as [B, T, S, C]; copy those that have no such view."""
    shape = tensors[0].shape
    lead = (*[1] * max(0, 4 - len(shape)), *shape[:-1])
    if len(lead) > 3:
        lead = (math.prod(lead[:-2]), *lead[-2:])
    if all(tensor.is_contiguous() for tensor in tensors):
        lead = (1, 1, math.prod(lead))
    views = []
    for tensor in tensors:
        view = tensor.reshape(*lead, shape[-1])
        views.append(view if view.stride(-1) == 1 else view.contiguous())
    count = math.prod(lead)
    assert count < 2**31, f"{count} tokens need 64-bit token numbers"
    return Tokens(lead[1], lead[2], count, views)


def group_modulations(x: Tensor, *modulations: Tensor) -> list[Tensor]:
    """Expand modulations of x to views [x.shape[:k], 1, ..., C], with the smallest k that they need.

    So the tokens of x fall into groups of neighbours that share all modulations.
    """
    full = [m[(None,) * (x.ndim - m.ndim)] for m in modulations]
    k = max([0] + [d + 1 for m in full for d in range(x.ndim - 1) if m.shape[d] != 1])
    shape = (*x.shape[:k], *[1] * (x.ndim - 1 - k), x.shape[-1])
    return [m.expand(shape) for m in full]


def flatten_modulation(modulation: Tensor) -> Tensor:
    """View a grouped modulation [x.shape[:k], 1, ..., C] as [groups, C] with channels at stride 1; copy if needed."""
    flat = modulation.reshape(-1, modulation.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def as_sequences(tensor: Tensor) -> Tensor:
    """View [..., N, heads, D] as [A, R, N, heads, D] with channels at stride 1; copy if there is no such view."""
    shape = (*[1] * max(0, 5 - tensor.ndim), *tensor.shape)
    shape = (math.prod(shape[:-4]), *shape[-4:])
    view = tensor.reshape(shape)
    assert math.prod(shape[:-1]) < 2**31, f"{shape} needs 64-bit head numbers"
    return view if view.stride(-1) == 1 else view.contiguous()


def alignment(*tensors: Tensor) -> int:
    """Return the largest power of two up to 16 that divides all strides but the last of [A, R, N, heads, D] tensors."""
    return math.gcd(16, *[stride for tensor in tensors for stride in tensor.stride()[:-1]])
