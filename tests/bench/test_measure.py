"""Test how calls are measured: peaks, counts, rotation of buffers, and a run of ``pytest bench/``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import Call, cache_bytes, copy_bytes_per_second, footprint, rotation_length
from torch import Tensor

ROOT = Path(__file__).parents[2]
SCALARS = 64  # bytes: torch wraps numbers and the profiler's own marks into tensors of 4 or 8
needs_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts operators and allocations of the CPU"
)


def two_temporaries(x: Tensor) -> Tensor:
    """Holds two temporaries of x's size at once, then the result beside one of them, then the result alone."""
    doubled = x + x
    shifted = doubled + 1
    del doubled
    return shifted.mul(3)


@needs_cpu
def test_footprint_counts_bytes_held_at_once_and_operators() -> None:
    x = torch.ones(2**16)
    used = footprint(Call(lambda: (x,), two_temporaries))
    assert 0 <= used.peak_bytes - 2 * x.nbytes <= SCALARS
    assert used.items == 3


@needs_cpu
def test_what_prepare_leaves_counts_towards_the_peak_but_its_own_peak_does_not() -> None:
    def prepare() -> tuple[Tensor]:
        torch.empty(2**20)  # freed at once
        return (torch.ones(2**16),)

    used = footprint(Call(prepare, lambda x: x.add(1)))
    assert 0 <= used.peak_bytes - 2 * 4 * 2**16 <= SCALARS
    assert used.items == 1


@needs_cpu
def test_backward_of_the_yardstick_is_counted() -> None:
    x = torch.ones(2**16, requires_grad=True)
    used = footprint(Call(lambda: (x.pow(2).sum(), [x]), torch.autograd.grad))
    assert used.peak_bytes >= x.nbytes
    assert used.items >= 3


@pytest.mark.parametrize("set_bytes", [1, 10**6, 10**12])
def test_a_rotation_outgrows_the_caches(set_bytes: int) -> None:
    length = rotation_length(set_bytes)
    assert length >= 2
    assert length * set_bytes >= 4 * cache_bytes()


@pytest.mark.long
def test_copy_rate_is_that_of_memory() -> None:
    assert 1e8 < copy_bytes_per_second(2**20) < 1e13


@pytest.mark.long
def test_a_benchmark_runs_and_prints_its_rows_without_writing_them(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (ROOT / "bench" / "results").glob("*.jsonl")}
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    # In several processes of pytest-xdist, benchmarks would be off.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/test_loss.py", "-q", "-k", "53 and not targets and both and f32 and "
         "(reference or eager)", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, env={**ours, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "bench: loss" in ran.stdout
    assert "1x4x10x30x53" in ran.stdout
    assert "1.00x" in ran.stdout
    assert {path: path.read_bytes() for path in (ROOT / "bench" / "results").glob("*.jsonl")} == before
