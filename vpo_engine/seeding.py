"""Random numbers that are a pure function of their seed and purpose.

All random numbers of a run come from generators keyed by (seed, purpose, position), never from a generator whose
state advances during the run. So a resumed run, a run on another number of processes and a run with another batch
size get the same numbers, and the position in the prompt stream is the only state.

torch's CPU generator takes 32 bits of a seed: of a million draws about a hundred repeat another's noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator for this seed and key."""
    return torch.Generator().manual_seed(_number(seed, *key) >> 1)


def integer(count: int, seed: int, *key: str | int) -> int:
    """Draw one of 0, ..., count - 1 for this seed and key, without a tensor."""
    return _number(seed, *key) % count  # of 2^64 numbers, so that small remainders are equally likely


def _number(seed: int, *key: str | int) -> int:
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def normal(shape: Sequence[int], seed: int, *key: str | int) -> Tensor:
    """Draw standard normal float32 numbers on the CPU for this seed and key."""
    return torch.randn(tuple(shape), generator=generator(seed, *key))
