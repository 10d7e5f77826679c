"""Deltas on GPUs: one elementwise pass, then torch's nonzero (encoding) or index_put (decoding) for the spilled.

Encoding makes the host wait once, for the number of spilled elements; decoding never. Bits travel as int16, which
Triton's interpreter, too, has right. Launches are not tuned on a GPU yet: what the compiler reports is loads and
stores of 16 bytes and no spills.
"""

# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpo_kernels.ordered_delta import reference as plain
from vpo_kernels.ordered_delta.contract import OrderedDelta

BLOCK = 4096  # elements of a program
WARPS = 8
INTERPRETED_BLOCK = 1 << 16  # the interpreter takes as long for a small block as for a large one


def _part(function: Callable[..., Any]) -> Any:
    """A part of kernels. The interpreter patches Triton anew at each call of a jitted one, so it gets plain Python."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


@_part
def _ordered(bits):  # type: ignore[no-untyped-def]
    """int32 of int16's range to itself."""
    return bits ^ ((bits >> 15) & 0x7FFF)


@triton.jit
def encode_kernel(
    difference_ptr: tl.tensor,  # int8 [elements]
    reference_ptr: tl.tensor,  # int16 [elements]
    policy_ptr: tl.tensor,  # int16 [elements]
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
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
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    policy = tl.load(policy_ptr + at, mask=inside, other=0).to(tl.int32)
    step = tl.load(difference_ptr + at, mask=inside, other=0).to(tl.int32)
    tl.store(out_ptr + at, _ordered(_ordered(policy) + step).to(tl.int16), mask=inside)


def _launch(kernel: Any, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    block = BLOCK if tensors[0].device.type != "cpu" else INTERPRETED_BLOCK
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(elements, block),)](*tensors, elements, BLOCK=block, num_warps=WARPS)


def encode(reference: Tensor, policy: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """See ``contract.Backend``."""
    _launch(encode_kernel, difference, reference.view(torch.int16), policy.view(torch.int16))
    return plain.spilled(reference, difference)


def decode(delta: OrderedDelta, policy: Tensor, out: Tensor) -> None:
    """See ``contract.Backend``."""
    _launch(decode_kernel, out.view(torch.int16), delta.difference, policy.view(torch.int16))
    plain.restore(delta, out)
