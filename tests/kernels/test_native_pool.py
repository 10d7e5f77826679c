"""The threads that the native kernels keep: forks, concurrent callers, changes of their number, the process's end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from after_torch import run_after_torch
from vpo_kernels.paired_dpo.contract import Forward, GradientInputs, Options, PairTensors

native: Any = pytest.importorskip("vpo_kernels.paired_dpo.native", exc_type=ImportError)

PLAIN = Options(500.0, 1.0, "mean", 0.0, None)
SECONDS = 600  # within which a child process must have ended

TENSORS_OF_A_CHILD = """
import os, sys, threading
import torch
from vpo_kernels.paired_dpo import native
from vpo_kernels.paired_dpo.contract import Options, PairTensors

torch.set_num_threads(4)
tensors = PairTensors(*(torch.randn(2, 300_000).bfloat16() for _ in range(6)))
plain = Options(500.0, 1.0, "mean", 0.0, None)
native.forward(tensors, None, None, plain)
"""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def tensors_of(seed: int = 0, elements: int = 300_000) -> PairTensors:
    generator = torch.Generator().manual_seed(seed)
    return PairTensors(*(torch.randn(2, elements, generator=generator).bfloat16() for _ in range(6)))


def bits(tensors: PairTensors) -> list[bytes]:
    """Return the bits of everything that forward and backward compute."""
    found: Forward = native.forward(tensors, None, None, PLAIN)
    steps = native.gradient(
        GradientInputs(tensors.policy, tensors.target, None, None, found.coefficient, torch.ones(()))
    )
    return [
        each.contiguous().view(torch.uint8).numpy().tobytes()
        for each in (found.out.loss.view(1), *found.out[1:], found.coefficient, found.slope, *steps)
    ]


def kept_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_many_calls_have_the_same_bits_and_start_no_more_threads() -> None:
    tensors = tensors_of()
    first = bits(tensors)
    running = kept_threads()
    assert all(bits(tensors) == first for _ in range(100))
    assert kept_threads() == running


def test_the_number_of_threads_may_change_between_calls() -> None:
    tensors = tensors_of()
    torch.set_num_threads(1)
    alone = bits(tensors)
    for count in (4, 2, 9, 1, 3):
        torch.set_num_threads(count)
        assert bits(tensors) == alone


def test_callers_at_once_get_their_own_results() -> None:
    each = [tensors_of(seed) for seed in range(3)]
    alone = [bits(tensors) for tensors in each]
    with ThreadPoolExecutor(3) as callers:
        together = list(callers.map(lambda i: bits(each[i % 3]), range(60)))
    assert together == alone * 20


def test_forks_of_forks_compute_after_their_parents_did() -> None:
    tensors = tensors_of()
    wanted = bits(tensors)
    child = os.fork()
    if child == 0:
        right = bits(tensors) == wanted
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if bits(tensors) == wanted else 1)
        right = right and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
        os._exit(0 if right and bits(tensors) == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bits(tensors) == wanted


def test_a_fork_while_another_thread_computes() -> None:
    tensors, other = tensors_of(), tensors_of(1, 3_000_000)
    wanted = bits(tensors)
    with ThreadPoolExecutor(1) as busy:
        computing = busy.submit(lambda: [native.forward(other, None, None, PLAIN) for _ in range(10)])
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(0 if bits(tensors) == wanted else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        computing.result()


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system does not bind threads to processors"
)
def test_threads_stay_on_the_processor_that_a_process_is_limited_to() -> None:
    """They keep off the caller's processor only where they may use another one."""
    tensors = tensors_of()
    wanted, allowed = bits(tensors), {min(os.sched_getaffinity(0))}
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, allowed)
        right = all(bits(tensors) == wanted for _ in range(5))
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        bound = len(tasks) > 1 and all(os.sched_getaffinity(task) == allowed for task in tasks)
        os._exit(0 if right and bound else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("end", ["", pytest.param("sys.exit(0)", marks=pytest.mark.long)])
def test_a_process_ends_while_the_threads_wait(end: str) -> None:
    assert run_after_torch(TENSORS_OF_A_CHILD + end) == (0, "")


@pytest.mark.long
def test_a_process_ends_while_a_daemon_thread_computes() -> None:
    """The thread calls the extension alone: torch's own calls may abort a process that ends under them."""
    computing = """
views = [native._view(tensor) for tensor in tensors]
out = [torch.empty(size, dtype=torch.float64) for size in ((), (7, 2), (2, 2), (2, 2))]
inputs = (native.INSTRUCTION_SET, (2, 300_000), views, None, None, (3e5, 0))
rest = (((500.0, 0), (1.0, 0), True, 0.0, None), False, 4, [each.data_ptr() for each in out])
started = threading.Event()

def compute():
    while True:
        native.extension.forward(*inputs, *rest)
        started.set()

threading.Thread(target=compute, daemon=True).start()
started.wait()
"""
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", TENSORS_OF_A_CHILD + computing],
            timeout=SECONDS,
            capture_output=True,
            text=True,
        )
        assert (ran.returncode, ran.stderr) == (0, "")
