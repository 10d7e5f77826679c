"""A process whose models are large does not keep the memory that it has freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from vpo_engine.memory.host_allocator import return_freed_memory

PROBE = """
import sys, torch
from vpo_engine.memory.host_allocator import return_freed_memory
def resident():
    lines = open("/proc/self/status").read().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
torch.empty(8 << 20, dtype=torch.uint8)  # freed: from now on such blocks come from the heap
if int(sys.argv[1]):
    assert return_freed_memory(torch.device("cpu"), 2**40)
before = resident()
blocks = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(40)]
last = torch.ones(6 << 20, dtype=torch.uint8)
del blocks
print(resident() - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set")


@needs_glibc
@pytest.mark.long
def test_freed_blocks_below_one_in_use_go_back_to_the_system() -> None:
    kept, returned = (
        float(
            subprocess.run(
                [sys.executable, "-c", PROBE, flag], capture_output=True, text=True, check=True
            ).stdout
        )
        for flag in "01"
    )
    assert kept > 200  # MiB: the heap cannot shrink below the block that is in use
    assert returned < 40


def test_small_models_and_gpus_are_left_alone() -> None:
    assert not return_freed_memory(torch.device("cpu"), 255 * 2**20)
    assert not return_freed_memory(torch.device("cuda"), 2**40)
