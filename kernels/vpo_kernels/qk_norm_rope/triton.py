"""RMS norm of a head and rotary embedding on a GPU: one pass forward, one backward.

A program takes a chunk of heads, counted over [A, R, N, heads]. The tensors are read at their own strides, so that
queries and keys are views of one qkv tensor. Pairs of channels are split and joined in registers, so that loads and
stores stay whole. Arithmetic is float32.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.token_layout import alignment, as_sequences, new_like
from vpo_kernels.triton_parts import Launch, block_sum, head_offset, kernel_part, load_heads, sum_chunks


def forward_launch(channels: int, count: int) -> Launch:
    """Return the launch, a function of the shape alone. It is not tuned on a GPU yet."""
    return Launch(max(16, triton.next_power_of_2(channels)), tile=32, chunk=32)


def backward_launch(channels: int, count: int) -> Launch:
    """Return the launch, a function of the shape alone, so that sums do not depend on the GPU. It is not tuned yet."""
    chunk = 128 if count <= 2**18 else 512
    return Launch(max(16, triton.next_power_of_2(channels)), tile=32, chunk=chunk)


@kernel_part
def _rotate(x, cos, sin, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Turn the pairs of channels of [TILE, BLOCK] by angles given as cos and sin [TILE, BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(x, [TILE, BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [TILE, BLOCK])


@kernel_part
def _angles(cos_ptr, sin_ptr, position, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load cos and sin at positions [TILE, 1], as float32 [TILE, BLOCK / 2]."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    at = position * (D // 2) + pair
    cos = tl.load(cos_ptr + at, mask=pair < D // 2, other=1.0)
    sin = tl.load(sin_ptr + at, mask=pair < D // 2, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def forward_kernel(
    out_ptr: tl.tensor,  # [A, R, N, heads, D]
    x_ptr: tl.tensor,  # [A, R, N, heads, D]
    weight_ptr: tl.tensor,  # [D]
    cos_ptr: tl.tensor,  # [N, D / 2], not read without ROPE
    sin_ptr: tl.tensor,  # [N, D / 2]
    count: tl.tensor,  # A * R * N * heads
    sizes: tl.tuple,  # R, N, heads
    out_strides: tl.tuple,  # of A, R, N and heads, in elements
    x_strides: tl.tuple,
    eps: tl.tensor,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    for start in range(0, CHUNK, TILE):
        index = (tl.program_id(0) * CHUNK + start + tl.arange(0, TILE))[:, None]
        inside = (index < count) & (column < D)
        x = load_heads(x_ptr, index, sizes, x_strides, column, inside, ALIGN)
        rstd = tl.rsqrt(block_sum(x * x, axis=1, keep_dims=True) / D + eps)
        out = x * rstd * weight
        if ROPE:
            cos, sin = _angles(cos_ptr, sin_ptr, index // sizes[2] % sizes[1], D, BLOCK)
            out = _rotate(out, cos, sin, TILE, BLOCK)
        tl.store(out_ptr + head_offset(index, sizes, out_strides, ALIGN) + column, out, mask=inside)


@triton.jit
def backward_kernel(
    grad_x_ptr: tl.tensor,  # [A, R, N, heads, D]
    grad_weight_ptr: tl.tensor,  # [programs, D], float32
    grad_ptr: tl.tensor,  # [A, R, N, heads, D]
    x_ptr: tl.tensor,  # [A, R, N, heads, D]
    weight_ptr: tl.tensor,  # [D]
    cos_ptr: tl.tensor,  # [N, D / 2], not read without ROPE
    sin_ptr: tl.tensor,  # [N, D / 2]
    count: tl.tensor,  # A * R * N * heads
    sizes: tl.tuple,  # R, N, heads
    grad_x_strides: tl.tuple,  # of A, R, N and heads, in elements
    grad_strides: tl.tuple,
    x_strides: tl.tuple,
    eps: tl.tensor,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, CHUNK, TILE):
        index = (tl.program_id(0) * CHUNK + start + tl.arange(0, TILE))[:, None]
        inside = (index < count) & (column < D)
        x = load_heads(x_ptr, index, sizes, x_strides, column, inside, ALIGN)
        inner = load_heads(grad_ptr, index, sizes, grad_strides, column, inside, ALIGN)
        if ROPE:
            cos, sin = _angles(cos_ptr, sin_ptr, index // sizes[2] % sizes[1], D, BLOCK)
            inner = _rotate(inner, cos, -sin, TILE, BLOCK)
        rstd = tl.rsqrt(block_sum(x * x, axis=1, keep_dims=True) / D + eps)
        normed = x * rstd
        grad_weight += inner * normed
        inner = inner * weight
        slope = block_sum(inner * normed, axis=1, keep_dims=True) / D
        grad_x_at = grad_x_ptr + head_offset(index, sizes, grad_x_strides, ALIGN) + column
        tl.store(grad_x_at, rstd * (inner - normed * slope), mask=inside)
    partial = grad_weight_ptr + tl.program_id(0).to(tl.int64) * D + column
    tl.store(partial, block_sum(grad_weight, axis=0, keep_dims=True), mask=column < D)


def _tables(cos: Tensor | None, sin: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return tables that a kernel can be given, and whether it reads them."""
    if cos is None or sin is None:
        return unused, unused, False
    return cos.contiguous(), sin.contiguous(), True


def forward(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """Return the result for x [..., N, heads, D] in its shape, dtype and order of dimensions."""
    out = new_like(x, dimensions=5)
    x5, out5, weight = as_sequences(x), as_sequences(out), weight.contiguous()
    cos, sin, rope = _tables(cos, sin, weight)
    count = x.numel() // x.shape[-1]
    launch = forward_launch(x.shape[-1], count)
    forward_kernel[(triton.cdiv(count, launch.chunk),)](
        out5,
        x5,
        weight,
        cos,
        sin,
        count,
        tuple(x5.shape[1:4]),
        out5.stride()[:4],
        x5.stride()[:4],
        eps,
        D=x.shape[-1],
        ALIGN=alignment(x5, out5),
        ROPE=rope,
        **launch.constants(),
    )
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients to x (laid out as x) and to weight. Results repeat bit for bit."""
    grad_x = new_like(x, dimensions=5)
    x5, grad5, grad_x5 = as_sequences(x), as_sequences(grad), as_sequences(grad_x)
    cos, sin, rope = _tables(cos, sin, weight)
    channels = x.shape[-1]
    count = x.numel() // channels
    launch = backward_launch(channels, count)
    programs = triton.cdiv(count, launch.chunk)
    partial = x.new_empty((1, programs, channels), dtype=torch.float32)
    backward_kernel[(programs,)](
        grad_x5,
        partial,
        grad5,
        x5,
        weight.contiguous(),
        cos,
        sin,
        count,
        tuple(x5.shape[1:4]),
        grad_x5.stride()[:4],
        grad5.stride()[:4],
        x5.stride()[:4],
        eps,
        D=channels,
        ALIGN=alignment(grad_x5, grad5, x5),
        ROPE=rope,
        **launch.constants(),
    )
    return grad_x, sum_chunks(partial, weight.dtype).view(channels)
