"""Parts that the Triton kernels share: addresses of tokens and heads, and sums over tokens.

Sums over tokens run in two stages. Each operation's backward kernel stores partial sums of chunks of tokens, and
``sum_chunks`` adds those in one fixed order, without atomics. The size of a chunk is a function of the shape alone, so
that results do not depend on the GPU.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    raise ImportError(
        f"triton {triton.__version__} is too old; the kernels need 3.4, which comes with torch 2.8"
    )

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
COLUMNS = 32
CHUNKS = 128


def kernel_part(function: Callable[..., Any]) -> Any:
    """Make a function callable from kernels.

    The interpreter patches Triton anew at each call of a jitted function, which is slow, so that it gets plain Python.
    """
    return function if triton.knobs.runtime.interpret else triton.jit(function)


block_sum = tl.sum.fn if INTERPRETED else tl.sum
block_max = tl.max.fn if INTERPRETED else tl.max


@dataclass(frozen=True)
class Launch:
    """The launch of a kernel over tokens or heads.

    block: channels of a program. tile: tokens or heads worked on at once. chunk: tokens or heads of a program.
    """

    block: int
    tile: int
    chunk: int
    warps: int = 4

    def constants(self) -> dict[str, int]:
        """Return these numbers as the kernel's arguments."""
        return {"BLOCK": self.block, "TILE": self.tile, "CHUNK": self.chunk, "num_warps": self.warps}


@kernel_part
def token_offset(token, frames, patches, strides):
    """Return the elements before a token of a [B, T, S, C] tensor, 64 bits wide. strides: of B, T and S."""
    b = (token // (frames * patches)).to(tl.int64)
    t = (token // patches % frames).to(tl.int64)
    s = (token % patches).to(tl.int64)
    return b * strides[0] + t * strides[1] + s * strides[2]


@kernel_part
def head_offset(index, sizes, strides, ALIGN: tl.constexpr):
    """Return the elements before head ``index`` [places, 1] of an [A, R, N, heads, D] tensor, 64 bits wide.

    Heads are counted in the order of the dimensions. sizes: (R, N, heads). strides: of A, R, N and heads. ALIGN: a
    power of two that divides all strides, so that channels load in whole vectors.
    """
    h = (index % sizes[2]).to(tl.int64)
    n = (index // sizes[2] % sizes[1]).to(tl.int64)
    r = (index // (sizes[2] * sizes[1]) % sizes[0]).to(tl.int64)
    a = (index // (sizes[2] * sizes[1] * sizes[0])).to(tl.int64)
    offset = a * strides[0] + r * strides[1] + n * strides[2] + h * strides[3]
    return tl.multiple_of(offset, (ALIGN, ALIGN))


@kernel_part
def load_heads(pointer, index, sizes, strides, column, inside, ALIGN: tl.constexpr):
    """Load the heads of the numbers ``index`` [TILE, 1], as float32 [TILE, BLOCK]; see ``head_offset``."""
    at = pointer + head_offset(index, sizes, strides, ALIGN) + column
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_chunks_kernel(
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
    tl.store(out_ptr + group * C + column, block_sum(total, axis=0).to(tl.float32), mask=inside)


def sum_chunks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum float32 [groups, chunks, C] over the chunks, in float64; return [groups, C] in ``dtype``."""
    groups, chunks, channels = partial.shape
    out = partial.new_empty((groups, channels), dtype=dtype)
    blocks = triton.cdiv(channels, COLUMNS)
    sum_chunks_kernel[(groups * blocks,)](
        out, partial, chunks, blocks, C=channels, COLUMNS=COLUMNS, CHUNKS=CHUNKS, num_warps=4
    )
    return out
