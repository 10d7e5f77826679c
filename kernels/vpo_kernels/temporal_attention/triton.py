"""Attention of short sequences on a GPU: a tile holds whole sequences, so that scores never leave registers.

A problem is one head of one sequence. A program takes as many problems as fit into a tile of 16, 32 or 64
positions; scores between different problems are masked. The backward pass recomputes scores and probabilities from q,
k and v: nothing else is saved. Softmax is float32. Products of 16-bit inputs go through TF32 tensor cores, which
represent such inputs exactly, and products of float32 inputs through float32.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.token_layout import alignment, as_sequences, new_like, promoted_dtype
from vpo_kernels.triton_parts import block_max, block_sum, head_offset, kernel_part, load_heads

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Launch:
    """The configuration of a launch. tile: positions of a program. packed: its problems. block: channels, padded."""

    tile: int
    packed: int
    block: int
    precision: Literal["tf32", "ieee"]
    warps: int


def launch_of(length: int, channels: int, dtype: torch.dtype) -> Launch:
    """Return the launch, a function of shape and dtype alone; it uses more than half of the tile.

    It is not tuned on a GPU yet.
    """
    tile = max(16, triton.next_power_of_2(length))
    precision: Literal["tf32", "ieee"] = "ieee" if dtype == torch.float32 else "tf32"
    block = max(16, triton.next_power_of_2(channels))
    return Launch(tile, tile // length, block, precision, warps={16: 2, 32: 4, 64: 8}[tile])


@kernel_part
def _positions(problems, sizes, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Return, for each place in the tile: its problem within the program, its head's number, whether it exists.

    Padding has problem PACKED. Heads are counted over [A, R, N, heads].
    """
    length, heads = sizes[1], sizes[2]
    place = tl.arange(0, TILE)
    member = place // length
    problem = tl.program_id(0) * PACKED + member
    exists = (member < PACKED) & (problem < problems)
    index = (problem // heads * length + place % length) * heads + problem % heads
    return member, index[:, None], exists[:, None]


@kernel_part
def _store(pointer, index, sizes, strides, column, inside, values, ALIGN: tl.constexpr):
    tl.store(pointer + head_offset(index, sizes, strides, ALIGN) + column, values, mask=inside)


@kernel_part
def _probabilities(q, k, same, scale, PRECISION: tl.constexpr):
    """Return the softmax over the places of the same problem, float32 [TILE, TILE]; padding attends to padding."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    scores = tl.where(same, scores, float("-inf"))
    p = tl.exp2(scores - block_max(scores, axis=1, keep_dims=True))
    return p / block_sum(p, axis=1, keep_dims=True)


@triton.jit
def forward_kernel(
    out_ptr: tl.tensor,  # [A, R, N, heads, D], as all
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    problems: tl.tensor,  # A * R * heads
    sizes: tl.tuple,  # R, N, heads
    out_strides: tl.tuple,  # of A, R, N and heads, in elements
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    scale: tl.tensor,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    member, index, exists = _positions(problems, sizes, TILE, PACKED)
    column = tl.arange(0, BLOCK)[None, :]
    inside = exists & (column < D)
    q = load_heads(q_ptr, index, sizes, q_strides, column, inside, ALIGN)
    k = load_heads(k_ptr, index, sizes, k_strides, column, inside, ALIGN)
    v = load_heads(v_ptr, index, sizes, v_strides, column, inside, ALIGN)
    p = _probabilities(q, k, member[:, None] == member[None, :], scale, PRECISION)
    out = tl.dot(p, v, input_precision=PRECISION)
    _store(out_ptr, index, sizes, out_strides, column, inside, out, ALIGN)


@triton.jit
def backward_kernel(
    grad_q_ptr: tl.tensor,  # [A, R, N, heads, D], as all
    grad_k_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    problems: tl.tensor,  # A * R * heads
    sizes: tl.tuple,  # R, N, heads
    grad_q_strides: tl.tuple,  # of A, R, N and heads, in elements
    grad_k_strides: tl.tuple,
    grad_v_strides: tl.tuple,
    grad_strides: tl.tuple,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    scale: tl.tensor,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    member, index, exists = _positions(problems, sizes, TILE, PACKED)
    column = tl.arange(0, BLOCK)[None, :]
    inside = exists & (column < D)
    q = load_heads(q_ptr, index, sizes, q_strides, column, inside, ALIGN)
    k = load_heads(k_ptr, index, sizes, k_strides, column, inside, ALIGN)
    v = load_heads(v_ptr, index, sizes, v_strides, column, inside, ALIGN)
    grad = load_heads(grad_ptr, index, sizes, grad_strides, column, inside, ALIGN)
    p = _probabilities(q, k, member[:, None] == member[None, :], scale, PRECISION)
    grad_v = tl.dot(tl.trans(p), grad, input_precision=PRECISION)
    _store(grad_v_ptr, index, sizes, grad_v_strides, column, inside, grad_v, ALIGN)
    grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_s = p * (grad_p - block_sum(p * grad_p, axis=1, keep_dims=True)) * scale
    grad_q = tl.dot(grad_s, k, input_precision=PRECISION)
    _store(grad_q_ptr, index, sizes, grad_q_strides, column, inside, grad_q, ALIGN)
    grad_k = tl.dot(tl.trans(grad_s), q, input_precision=PRECISION)
    _store(grad_k_ptr, index, sizes, grad_k_strides, column, inside, grad_k, ALIGN)


def _run(kernel: triton.JITFunction, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Launch a kernel, which writes to ``outputs``. All tensors are [..., N, heads, D]."""
    tensors = [as_sequences(tensor) for tensor in (*outputs, *inputs)]
    repeats, sequences, length, heads, channels = tensors[0].shape
    problems = repeats * sequences * heads
    launch = launch_of(length, channels, promoted_dtype(*inputs))
    kernel[(triton.cdiv(problems, launch.packed),)](
        *tensors,
        problems,
        (sequences, length, heads),
        *(tensor.stride()[:4] for tensor in tensors),
        channels**-0.5,
        D=channels,
        ALIGN=alignment(*tensors),
        BLOCK=launch.block,
        TILE=launch.tile,
        PACKED=launch.packed,
        PRECISION=launch.precision,
        num_warps=launch.warps,
    )


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention's output [..., N, heads, D], laid out as q, in its dtype."""
    out = new_like(q, dimensions=5)
    _run(forward_kernel, (out,), (q, k, v))
    return out


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to q, k and v, laid out as they are. Results repeat bit for bit."""
    grads = (new_like(q, dimensions=5), new_like(k, dimensions=5), new_like(v, dimensions=5))
    _run(backward_kernel, grads, (grad, q, k, v))
    return grads
