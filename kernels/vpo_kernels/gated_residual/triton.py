"""Gated residual on a GPU: one pass forward, one backward.

A program takes a chunk of tokens of one group, which share the gate, and a block of channels. x, y and the gradient are
read at their own strides, so that attention's transposed output needs no copy. Arithmetic is float32.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.token_layout import as_tokens, flatten_modulation, new_like, promoted_dtype
from vpo_kernels.triton_parts import Launch, block_sum, kernel_part, sum_chunks, token_offset


def forward_launch(channels: int, tokens: int) -> Launch:
    """Return the launch, a function of the shape alone. It is not tuned on a GPU yet."""
    return Launch(min(128, triton.next_power_of_2(channels)), tile=16, chunk=32)


def backward_launch(channels: int, tokens: int) -> Launch:
    """Return the launch, a function of the shape alone, so that sums do not depend on the GPU. It is not tuned yet."""
    return Launch(min(128, triton.next_power_of_2(channels)), tile=16, chunk=64 if tokens <= 16384 else 256)


@kernel_part
def _work(
    gate_ptr, gate_stride, chunks, column_blocks, C: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Return what this program works on.

    These are the number of its chunk, counted over all groups; its group; its first token within the group; its
    columns [1, BLOCK]; which of them exist; and the gate there, float32.
    """
    part = tl.program_id(0) // column_blocks
    group, first = part // chunks, part % chunks * CHUNK
    column = (tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = column < C
    gate = tl.load(gate_ptr + group.to(tl.int64) * gate_stride + column, mask=valid, other=0.0)
    return part, group, first, column, valid, gate.to(tl.float32)


@triton.jit
def forward_kernel(
    out_ptr: tl.tensor,  # [tokens, C]
    x_ptr: tl.tensor,  # [B, T, S, C]
    gate_ptr: tl.tensor,  # [groups, C]
    y_ptr: tl.tensor,  # [B, T, S, C]
    group_tokens: tl.tensor,
    chunks: tl.tensor,
    column_blocks: tl.tensor,
    frames: tl.tensor,
    patches: tl.tensor,
    x_strides: tl.tuple,  # of B, T and S, in elements
    y_strides: tl.tuple,
    gate_stride: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    _, group, first, column, valid, gate = _work(
        gate_ptr, gate_stride, chunks, column_blocks, C, BLOCK, CHUNK
    )
    for start in range(0, CHUNK, TILE):
        member = (first + start + tl.arange(0, TILE))[:, None]
        inside = (member < group_tokens) & valid
        token = group * group_tokens + member
        x_at = x_ptr + token_offset(token, frames, patches, x_strides) + column
        y_at = y_ptr + token_offset(token, frames, patches, y_strides) + column
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token.to(tl.int64) * C + column, x + gate * y, mask=inside)


@triton.jit
def backward_kernel(
    grad_gate_ptr: tl.tensor,  # [groups, chunks, C], float32
    grad_y_ptr: tl.tensor,  # [B, T, S, C], at strides of its own
    grad_ptr: tl.tensor,  # [B, T, S, C]
    gate_ptr: tl.tensor,  # [groups, C]
    y_ptr: tl.tensor,  # [B, T, S, C]
    group_tokens: tl.tensor,
    chunks: tl.tensor,
    column_blocks: tl.tensor,
    frames: tl.tensor,
    patches: tl.tensor,
    grad_y_strides: tl.tuple,  # of B, T and S, in elements
    grad_strides: tl.tuple,
    y_strides: tl.tuple,
    gate_stride: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    part, group, first, column, valid, gate = _work(
        gate_ptr, gate_stride, chunks, column_blocks, C, BLOCK, CHUNK
    )
    grad_gate = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, CHUNK, TILE):
        member = (first + start + tl.arange(0, TILE))[:, None]
        inside = (member < group_tokens) & valid
        token = group * group_tokens + member
        grad_at = grad_ptr + token_offset(token, frames, patches, grad_strides) + column
        y_at = y_ptr + token_offset(token, frames, patches, y_strides) + column
        grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        grad_gate += grad * y
        grad_y_at = grad_y_ptr + token_offset(token, frames, patches, grad_y_strides) + column
        tl.store(grad_y_at, grad * gate, mask=inside)
    partial = grad_gate_ptr + part.to(tl.int64) * C + column
    tl.store(partial, block_sum(grad_gate, axis=0, keep_dims=True), mask=valid)


def forward(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return x + gate * y [..., C], contiguous, in the promoted dtype.

    gate: as ``token_layout.group_modulations`` gives it.
    """
    out = x.new_empty(x.shape, dtype=promoted_dtype(x, gate, y))
    tokens, gate = as_tokens(x, y), flatten_modulation(gate)
    groups, channels = gate.shape
    launch = forward_launch(channels, tokens.total)
    chunks, blocks = triton.cdiv(tokens.total // groups, launch.chunk), triton.cdiv(channels, launch.block)
    forward_kernel[(groups * chunks * blocks,)](
        out,
        tokens.tensors[0],
        gate,
        tokens.tensors[1],
        tokens.total // groups,
        chunks,
        blocks,
        tokens.frames,
        tokens.patches,
        *(tensor.stride()[:3] for tensor in tokens.tensors),
        gate.stride(0),
        C=channels,
        **launch.constants(),
    )
    return out


def backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients to gate and to y (laid out as y). Results repeat bit for bit."""
    grad_y = new_like(y)
    tokens, flat_gate = as_tokens(grad_y, grad, y), flatten_modulation(gate)
    groups, channels = flat_gate.shape
    launch = backward_launch(channels, tokens.total)
    chunks, blocks = triton.cdiv(tokens.total // groups, launch.chunk), triton.cdiv(channels, launch.block)
    partial = y.new_empty((groups, chunks, channels), dtype=torch.float32)
    backward_kernel[(groups * chunks * blocks,)](
        partial,
        tokens.tensors[0],
        tokens.tensors[1],
        flat_gate,
        tokens.tensors[2],
        tokens.total // groups,
        chunks,
        blocks,
        tokens.frames,
        tokens.patches,
        *(tensor.stride()[:3] for tensor in tokens.tensors),
        flat_gate.stride(0),
        C=channels,
        **launch.constants(),
    )
    return sum_chunks(partial, gate.dtype).view(gate.shape), grad_y
