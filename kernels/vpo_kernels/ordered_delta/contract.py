"""What a delta is, and what passes between the operation and its backends.

The bits of a bfloat16, taken as int16, become an integer that grows with the value by an involution:
``ordered(bits) = bits ^ ((bits >> 15) & 0x7FFF)``, the shift being arithmetic. All 65536 patterns have a place,
-0.0 next below 0.0 and NaNs at both ends, so nothing is lost on any of them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

SPILLED = -128
"""In place of a difference outside [-127, 127]."""


class OrderedDelta(NamedTuple):
    """A reference, told by its difference from a policy: together they give it back bit for bit."""

    difference: Tensor  # int8, the policy's shape: ordered(reference) - ordered(policy), or SPILLED
    index: Tensor  # type: ignore[assignment]  # int32 [k], flat positions of what is SPILLED, ascending
    value: Tensor  # bfloat16 [k], the reference there


class Backend(Protocol):
    """What encodes and decodes. All backends give the same bits. Every tensor is contiguous and not empty."""

    def encode(self, reference: Tensor, policy: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Fills ``difference``; returns index and value."""
        ...

    def decode(self, delta: OrderedDelta, policy: Tensor, out: Tensor) -> None:
        """Fills ``out``, which may be ``policy`` itself."""
        ...
