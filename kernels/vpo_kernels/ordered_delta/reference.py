"""Deltas in plain torch: the formulas that every backend follows. GPUs treat spilled elements by them, too."""

from __future__ import annotations

import torch
from torch import Tensor

from vpo_kernels.ordered_delta.contract import SPILLED, OrderedDelta


def ordered(bits: Tensor) -> Tensor:
    """Map bits of bfloat16, as int16, to int16 integers that grow with the value, and back."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def encode(reference: Tensor, policy: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Encode; see ``contract.Backend``."""
    step = ordered(reference.view(torch.int16)).int() - ordered(policy.view(torch.int16))
    difference.copy_(step.masked_fill_(step.abs() >= -SPILLED, SPILLED))
    return spilled(reference, difference)


def spilled(reference: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and value of the SPILLED elements. On a GPU the host waits for their number."""
    index = (difference.view(-1) == SPILLED).nonzero().squeeze(1)
    return index.int(), reference.view(-1)[index]


def decode(delta: OrderedDelta, policy: Tensor, out: Tensor) -> None:
    """Decode; see ``contract.Backend``."""
    step = ordered(policy.view(torch.int16)) + delta.difference
    out.view(torch.int16).copy_(ordered(step))
    restore(delta, out)


def restore(delta: OrderedDelta, out: Tensor) -> None:
    """Write the spilled values to their places. The host does not wait for a GPU."""
    out.view(-1).index_put_((delta.index,), delta.value)
