"""What the row kernels share: the address of a row, and the second stage of the column sums.

Column sums run in two stages: partial sums of chunks of rows, then their sum in one fixed order.

The first stage, in each operation's backward kernel, stores one row of partial sums per chunk. Chunk sizes are
functions of the shape alone, so that the bits do not depend on the GPU. No atomics.
"""

# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 32
CHUNKS = 128


@triton.jit
def row_offset(
    row: tl.tensor,
    frames: tl.tensor,
    patches: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_s: tl.tensor,
) -> tl.tensor:
    """Elements before row ``row`` of a [B, T, S, C] tensor; 64 bits wide."""
    b = (row // (frames * patches)).to(tl.int64)
    t = (row // patches % frames).to(tl.int64)
    s = (row % patches).to(tl.int64)
    return b * stride_b + t * stride_t + s * stride_s


@triton.jit
def head_offset(
    index: tl.tensor,
    sequences: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    stride_a: tl.tensor,
    stride_r: tl.tensor,
    stride_n: tl.tensor,
    stride_h: tl.tensor,
    ALIGN: tl.constexpr,
) -> tl.tensor:
    """Elements before head ``index`` of an [A, R, N, heads, D] tensor, counted in that order; 64 bits wide.

    index: [places, 1]. ALIGN: a power of two that divides all strides, so that channels load in whole vectors.
    """
    h = (index % heads).to(tl.int64)
    n = (index // heads % length).to(tl.int64)
    r = (index // (heads * length) % sequences).to(tl.int64)
    a = (index // (heads * length * sequences)).to(tl.int64)
    offset = a * stride_a + r * stride_r + n * stride_n + h * stride_h
    return tl.multiple_of(offset, (ALIGN, ALIGN))


@triton.jit
def column_sums_kernel(
    out_ptr: tl.tensor,  # [groups, C], any float dtype
    partial_ptr: tl.tensor,  # [groups, chunks, C], float32
    chunks: tl.tensor,
    column_blocks: tl.tensor,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    group = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    total = tl.zeros([CHUNKS, COLUMNS], tl.float64)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        at = partial_ptr + (group * chunks + chunk)[:, None] * C + column[None, :]
        total += tl.load(at, mask=(chunk < chunks)[:, None] & inside[None, :], other=0.0).to(tl.float64)
    tl.store(out_ptr + group * C + column, tl.sum(total, axis=0).to(tl.float32), mask=inside)


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [groups, chunks, C] to its sum over chunks, [groups, C], in ``dtype``."""
    groups, chunks, channels = partial.shape
    out = partial.new_empty((groups, channels), dtype=dtype)
    blocks = triton.cdiv(channels, COLUMNS)
    column_sums_kernel[(groups * blocks,)](
        out, partial, chunks, blocks, C=channels, COLUMNS=COLUMNS, CHUNKS=CHUNKS, num_warps=4
    )
    return out
