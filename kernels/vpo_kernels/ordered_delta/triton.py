"""Deltas on GPUs: one elementwise pass, then torch's nonzero (encoding) or index_put (decoding) for the spilled.

Encoding makes the host wait once, for the number of spilled elements; decoding never does. Bits travel as int16, which
Triton's interpreter, too, treats correctly. Launches are not tuned on a GPU yet; the compiler reports loads and
stores of 16 bytes and no spills.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.ordered_delta import reference as plain
from vpo_kernels.ordered_delta.contract import OrderedDelta
from vpo_kernels.triton_parts import kernel_part

BLOCK = 4096  # elements of a program
WARPS = 8
INTERPRETED_BLOCK = 1 << 16  # elements of a program in the interpreter, which takes as long for a small block


@kernel_part
def _ordered(bits):
    """Map int32 in the range of int16 as ``reference.ordered`` does."""
    return bits ^ ((bits >> 15) & 0x7FFF)


@kernel_part
def _block(elements, BLOCK: tl.constexpr):
    """Return the positions that this program works on, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < elements


@triton.jit
def encode_kernel(
    difference_ptr: tl.tensor,  # int8 [elements]
    reference_ptr: tl.tensor,  # int16 [elements]
    policy_ptr: tl.tensor,  # int16 [elements]
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at, inside = _block(elements, BLOCK)
    reference = tl.load(reference_ptr + at, mask=inside, other=0).to(tl.int32)
    policy = tl.load(policy_ptr + at, mask=inside, other=0).to(tl.int32)
    step = _ordered(reference) - _ordered(policy)
    step = tl.where((step > -128) & (step < 128), step, -128)
    tl.store(difference_ptr + at, step.to(tl.int8), mask=inside)


@triton.jit
def decode_kernel(
    out_ptr: tl.tensor,  # int16 [elements]
    difference_ptr: tl.tensor,  # int8 [elements]
    policy_ptr: tl.tensor,  # int16 [elements]
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at, inside = _block(elements, BLOCK)
    policy = tl.load(policy_ptr + at, mask=inside, other=0).to(tl.int32)
    step = tl.load(difference_ptr + at, mask=inside, other=0).to(tl.int32)
    tl.store(out_ptr + at, _ordered(_ordered(policy) + step).to(tl.int16), mask=inside)


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Launch a kernel over contiguous tensors of as many elements."""
    elements = tensors[0].numel()
    block = BLOCK if tensors[0].device.type != "cpu" else INTERPRETED_BLOCK
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(elements, block),)](*tensors, elements, BLOCK=block, num_warps=WARPS)


def encode(reference: Tensor, policy: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Encode; see ``contract.Backend``."""
    _launch(encode_kernel, difference, reference.view(torch.int16), policy.view(torch.int16))
    return plain.spilled(reference, difference)


def decode(delta: OrderedDelta, policy: Tensor, out: Tensor) -> None:
    """Decode; see ``contract.Backend``."""
    _launch(decode_kernel, out.view(torch.int16), delta.difference, policy.view(torch.int16))
    plain.restore(delta, out)
