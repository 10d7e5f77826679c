"""Keep a run on a CPU at the memory that its plan says."""

from __future__ import annotations

import ctypes
import platform

import torch

_M_MMAP_THRESHOLD = -3
_THRESHOLD = 256 * 2**10
_LARGE = 256 * 2**20
"""Bytes of weights from which on a run returns memory. Smaller ones, such as the sprites world, are faster without."""


def return_freed_memory(device: torch.device, weights: int) -> bool:
    """Have the C library give freed blocks back to the system, in a process whose models have ``weights`` bytes.

    glibc maps large blocks one by one, but with every such block that is freed it raises the size from which on it
    does so, up to 32 MiB, and it keeps freed blocks below that size. A run with tensors of such sizes then grows with
    every step, to well beyond its plan. Fixing the size ends this. It is done for large models on CPUs only: a mapped
    block costs page faults when it is used, which tells where blocks are small and many.

    Return whether it was done.
    """
    if device.type != "cpu" or weights < _LARGE or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    done = bool(library.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    library.malloc_trim(0)
    return done
