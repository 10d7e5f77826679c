"""Random numbers as a pure function of what they are for.

Every draw of a run comes from a generator keyed by (seed, purpose, position), never from a stream that is
advanced as the run goes. So a resumed run, a run on another number of processes and a run whose rollout is cut
into other chunks see the same numbers, and the prompt cursor is all the state there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for this seed and key."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: Sequence[int], seed: int, *key: str | int) -> Tensor:
    """Standard normal float32 numbers on the CPU for this seed and key."""
    return torch.randn(tuple(shape), generator=generator(seed, *key))
