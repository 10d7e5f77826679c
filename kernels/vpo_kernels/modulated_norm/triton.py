"""Modulated LayerNorm on a GPU: one pass over x forward, one over x and the gradient backward.

A program takes a chunk of tokens of one group, which share shift and scale, so that it loads the modulation once. The
backward pass recomputes mean and rstd from the channels that it must load anyway, and keeps the sums over its tokens
in registers. Arithmetic is float32.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.token_layout import as_tokens, flatten_modulation, promoted_dtype
from vpo_kernels.triton_parts import Launch, block_sum, kernel_part, sum_chunks, token_offset


def _launch(channels: int, chunk: int, warps: int) -> Launch:
    block = triton.next_power_of_2(channels)
    tile = min(max(1, 2048 // block), chunk)
    return Launch(block, tile, chunk, warps if block <= 2048 else 8)


def forward_launch(channels: int, tokens: int) -> Launch:
    """Return the launch, a function of the shape alone. It is not tuned on a GPU yet."""
    return _launch(channels, chunk=4 if tokens <= 16384 else 8, warps=4)


def backward_launch(channels: int, tokens: int) -> Launch:
    """Return the launch, a function of the shape alone, so that sums do not depend on the GPU. It is not tuned yet."""
    return _launch(channels, chunk=16 if tokens <= 16384 else 64, warps=8)


@kernel_part
def _normalise(x, inside, eps, C: tl.constexpr):
    """Turn float32 [tile, block], zero outside, into normalised tokens and their rstd [tile, 1]."""
    mean = block_sum(x, axis=1, keep_dims=True) / C
    centred = tl.where(inside, x - mean, 0.0)
    variance = block_sum(centred * centred, axis=1, keep_dims=True) / C
    rstd = tl.rsqrt(variance + eps)
    return centred * rstd, rstd


@triton.jit
def forward_kernel(
    out_ptr: tl.tensor,  # [tokens, C]
    x_ptr: tl.tensor,  # [B, T, S, C]
    shift_ptr: tl.tensor,  # [groups, C]
    scale_ptr: tl.tensor,  # [groups, C]
    group_tokens: tl.tensor,
    chunks: tl.tensor,
    frames: tl.tensor,
    patches: tl.tensor,
    x_strides: tl.tuple,  # of B, T and S, in elements
    shift_stride: tl.tensor,
    scale_stride: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    group = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * CHUNK
    column = tl.arange(0, BLOCK)[None, :]
    valid = column < C
    shift = tl.load(shift_ptr + group.to(tl.int64) * shift_stride + column, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + group.to(tl.int64) * scale_stride + column, mask=valid, other=0.0)
    shift, factor = shift.to(tl.float32), 1 + scale.to(tl.float32)
    for start in range(0, CHUNK, TILE):
        member = (first + start + tl.arange(0, TILE))[:, None]
        inside = (member < group_tokens) & valid
        token = group * group_tokens + member
        x_at = x_ptr + token_offset(token, frames, patches, x_strides) + column
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        normed, _ = _normalise(x, inside, eps, C)
        tl.store(out_ptr + token.to(tl.int64) * C + column, normed * factor + shift, mask=inside)


@triton.jit
def backward_kernel(
    grad_x_ptr: tl.tensor,  # [tokens, C]
    grad_shift_ptr: tl.tensor,  # [groups, chunks, C], float32
    grad_scale_ptr: tl.tensor,  # [groups, chunks, C], float32
    grad_ptr: tl.tensor,  # [B, T, S, C]
    x_ptr: tl.tensor,  # [B, T, S, C]
    scale_ptr: tl.tensor,  # [groups, C]
    group_tokens: tl.tensor,
    chunks: tl.tensor,
    frames: tl.tensor,
    patches: tl.tensor,
    grad_strides: tl.tuple,  # of B, T and S, in elements
    x_strides: tl.tuple,
    scale_stride: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    group = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * CHUNK
    column = tl.arange(0, BLOCK)[None, :]
    valid = column < C
    scale = tl.load(scale_ptr + group.to(tl.int64) * scale_stride + column, mask=valid, other=0.0)
    factor = 1 + scale.to(tl.float32)
    grad_shift = tl.zeros([TILE, BLOCK], tl.float32)
    grad_scale = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, CHUNK, TILE):
        member = (first + start + tl.arange(0, TILE))[:, None]
        inside = (member < group_tokens) & valid
        token = group * group_tokens + member
        x_at = x_ptr + token_offset(token, frames, patches, x_strides) + column
        grad_at = grad_ptr + token_offset(token, frames, patches, grad_strides) + column
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        normed, rstd = _normalise(x, inside, eps, C)
        grad_shift += grad
        grad_scale += grad * normed
        inner = grad * factor
        mean = block_sum(inner, axis=1, keep_dims=True) / C
        slope = block_sum(inner * normed, axis=1, keep_dims=True) / C
        grad_x = rstd * (inner - mean - normed * slope)
        tl.store(grad_x_ptr + token.to(tl.int64) * C + column, grad_x, mask=inside)
    partial = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK)
    tl.store(grad_shift_ptr + partial, block_sum(grad_shift, axis=0), mask=tl.arange(0, BLOCK) < C)
    tl.store(grad_scale_ptr + partial, block_sum(grad_scale, axis=0), mask=tl.arange(0, BLOCK) < C)


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return the modulated norm of x [..., C], contiguous, in the promoted dtype.

    shift, scale: as ``token_layout.group_modulations`` gives them.
    """
    out = x.new_empty(x.shape, dtype=promoted_dtype(x, shift, scale))
    tokens, shift, scale = as_tokens(x), flatten_modulation(shift), flatten_modulation(scale)
    group_tokens = tokens.total // shift.shape[0]
    launch = forward_launch(x.shape[-1], tokens.total)
    chunks = triton.cdiv(group_tokens, launch.chunk)
    forward_kernel[(shift.shape[0] * chunks,)](
        out,
        tokens.tensors[0],
        shift,
        scale,
        group_tokens,
        chunks,
        tokens.frames,
        tokens.patches,
        tokens.tensors[0].stride()[:3],
        shift.stride(0),
        scale.stride(0),
        eps,
        C=x.shape[-1],
        **launch.constants(),
    )
    return out


def backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to x (contiguous), shift and scale. Results repeat bit for bit."""
    tokens, flat_scale = as_tokens(grad, x), flatten_modulation(scale)
    groups, channels = flat_scale.shape
    group_tokens = tokens.total // groups
    launch = backward_launch(channels, tokens.total)
    chunks = triton.cdiv(group_tokens, launch.chunk)
    grad_x = x.new_empty(x.shape)
    partial = x.new_empty((2, groups, chunks, channels), dtype=torch.float32)
    backward_kernel[(groups * chunks,)](
        grad_x,
        partial[0],
        partial[1],
        *tokens.tensors,
        flat_scale,
        group_tokens,
        chunks,
        tokens.frames,
        tokens.patches,
        *(tensor.stride()[:3] for tensor in tokens.tensors),
        flat_scale.stride(0),
        eps,
        C=channels,
        **launch.constants(),
    )
    grad_shift = sum_chunks(partial[0], shift.dtype).view(shift.shape)
    return grad_x, grad_shift, sum_chunks(partial[1], scale.dtype).view(scale.shape)
