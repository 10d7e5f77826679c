"""Deltas on CPUs, in C++ (kernels/native/delta.cpp): one pass, and another over the spilled elements of each chunk.

Threads are as many as torch's, where the work is worth them. Results depend neither on their number nor on the
processor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpo_kernels.native import INSTRUCTION_SET, extension
from vpo_kernels.ordered_delta.contract import OrderedDelta


def encode(reference: Tensor, policy: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Encode; see ``contract.Backend``."""
    made: list[Tensor] = []

    def allocate(spilled: int) -> tuple[int, int]:
        made.extend(torch.empty(spilled, dtype=dtype) for dtype in (torch.int32, torch.bfloat16))
        return made[0].data_ptr(), made[1].data_ptr()

    extension.encode_delta(
        INSTRUCTION_SET,
        policy.numel(),
        reference.data_ptr(),
        policy.data_ptr(),
        difference.data_ptr(),
        torch.get_num_threads(),
        allocate,
    )
    index, value = made
    return index, value


def decode(delta: OrderedDelta, policy: Tensor, out: Tensor) -> None:
    """Decode; see ``contract.Backend``."""
    extension.decode_delta(
        INSTRUCTION_SET,
        policy.numel(),
        delta.difference.data_ptr(),
        delta.index.data_ptr(),
        delta.value.data_ptr(),
        delta.index.numel(),
        policy.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
