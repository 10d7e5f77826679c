"""The definition of a delta, and the values that pass between the operation and its backends.

The bits of a bfloat16, taken as int16, become an integer that grows with the value by an involution:
``ordered(bits) = bits ^ ((bits >> 15) & 0x7FFF)``, the shift being arithmetic. All 65536 patterns have a place,
-0.0 next below 0.0 and NaNs at both ends, so that none of them is lost.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

SPILLED = -128
"""The mark that stands in place of a difference outside [-127, 127]."""


class OrderedDelta(NamedTuple):
    """The difference between a reference and a policy, from which the policy gives the reference back bit for bit."""

    difference: Tensor  # int8, the policy's shape: ordered(reference) - ordered(policy), or SPILLED
    index: Tensor  # type: ignore[assignment]  # int32 [k], flat positions of the SPILLED elements, ascending
    value: Tensor  # bfloat16 [k], the reference at those positions


class Backend(Protocol):
    """The module of a backend. All backends give the same bits. Every tensor is contiguous and not empty."""

    def encode(self, reference: Tensor, policy: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Fill ``difference``; return index and value of the delta."""
        ...

    def decode(self, delta: OrderedDelta, policy: Tensor, out: Tensor) -> None:
        """Fill ``out``, which may be ``policy`` itself."""
        ...
