"""Measure a call: seconds with cold caches, peak bytes, kernels or operators, and the machine's copy rate.

The same functions serve CPU and GPU. A call is a pair of functions: ``prepare`` makes the arguments and is not
measured; ``run`` is measured. The inputs rotate through so many buffers that a buffer has left the caches before it is
used again.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

SECONDS_PER_CASE = 0.25
COLD = 4  # size of a rotation as a multiple of the last-level cache
HEAD_START_CYCLES = 4_000_000  # about 2 ms: the GPU waits, so that all launches are queued when it starts
MEASURED = "measured call"


@functools.cache
def device() -> torch.device:
    """Return the device to measure on: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_gpu() -> bool:
    return device().type == "cuda"


@functools.cache
def cache_bytes() -> int:
    """Return the size of the last-level cache: the GPU's L2 or the CPU's largest cache; 64 MiB if it is not known."""
    if on_gpu():
        return torch.cuda.get_device_properties(device()).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return 1024 * max(kibibytes, default=64 * 1024)


def rotation_length(set_bytes: int) -> int:
    """Return how many sets of buffers of ``set_bytes`` are too large for any cache; at least 2."""
    return max(2, math.ceil(COLD * cache_bytes() / set_bytes))


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Call:
    """``run(*prepare())`` is one call; only ``run`` is measured."""

    prepare: Callable[[], tuple[Any, ...]]
    run: Callable[..., object]

    def run_and_wait(self, *arguments: Any) -> object:
        result = self.run(*arguments)
        synchronize()
        return result

    def rounds(self) -> int:
        """Return how many calls fill ``SECONDS_PER_CASE``, from 10 to 200, after three calls as warm-up."""
        for _ in range(3):
            arguments = self.prepare()
            synchronize()
            start = time.perf_counter()
            self.run_and_wait(*arguments)
            seconds = time.perf_counter() - start
        return min(200, max(10, round(SECONDS_PER_CASE / seconds)))


def device_seconds(call: Call, rounds: int) -> list[float]:
    """Measure seconds on the GPU alone, without launches: each call is queued while the GPU waits."""
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)
    ]
    for start, end in events:
        arguments = call.prepare()
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = call.run(*arguments)
        end.record()
        del result
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def host_seconds(call: Call, rounds: int) -> list[float]:
    """Measure seconds from the call until all of its work is done, starting with an idle device."""
    seconds = []
    for _ in range(rounds):
        arguments = call.prepare()
        synchronize()
        start = time.perf_counter()
        call.run_and_wait(*arguments)
        seconds.append(time.perf_counter() - start)
    return seconds


@functools.cache
def copy_bytes_per_second(moved_bytes: int) -> float:
    """Measure the median rate of ``Tensor.copy_`` between cold buffers; it reads and writes ``moved_bytes`` in all."""
    count = max(1, moved_bytes // 8)
    pairs = [
        (torch.ones(count, device=device()), torch.ones(count, device=device()))
        for _ in range(rotation_length(8 * count))
    ]
    turn = itertools.cycle(pairs)
    call = Call(lambda: next(turn), lambda source, target: target.copy_(source))
    times = device_seconds if on_gpu() else host_seconds
    seconds = torch.tensor(times(call, call.rounds()), dtype=torch.float64)
    return 8 * count / seconds.median().item()


# --- bytes and work items --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    peak_bytes: int
    """The most bytes allocated at once during the call, beyond those before its arguments were made."""
    items: int
    """Kernels launched on a GPU; on the CPU, operators issued. Compiled code issues none for its own loops."""


def footprint(call: Call) -> Footprint:
    """Measure a warm call. On the CPU all allocations of torch count, those inside C++ operators too."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu()
    before = torch.cuda.memory_allocated() if on_gpu() else 0
    with profile(activities=activities, profile_memory=True) as trace:
        arguments = call.prepare()
        synchronize()
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        with record_function(MEASURED):
            call.run_and_wait(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    marks = (event for event in events if event.get("cat") == "user_annotation")
    start = next(event["ts"] for event in marks if event["name"] == MEASURED)
    if on_gpu():
        kernels = sum(event.get("cat") == "kernel" and event["ts"] >= start for event in events)
        return Footprint(torch.cuda.max_memory_allocated() - before, kernels)
    return Footprint(_peak(events, start), _operators(events, start))


def _peak(events: Sequence[dict[str, Any]], start: float) -> int:
    """Return the largest number of allocated bytes at ``start`` or later, counted from the beginning of the trace."""
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = itertools.accumulate((change["args"]["Bytes"] for change in changes), initial=0)
    times = [*(change["ts"] for change in changes), math.inf]
    return max(total for total, until in zip(totals, times, strict=True) if until >= start)


def _operators(events: Sequence[dict[str, Any]], start: float) -> int:
    """Count the operators since ``start``: aten operators, without those inside them, and others that call none."""
    found = [e for e in events if e.get("cat") == "cpu_op" and re.fullmatch(r"\w+::[\w.]+", e["name"])]
    found = sorted((e for e in found if e["ts"] >= start), key=lambda e: (e["ts"], -e["dur"]))
    count, aten_until = 0, -math.inf
    for index, event in enumerate(found):
        end = event["ts"] + event["dur"]
        if event["ts"] < aten_until:
            continue
        if event["name"].startswith("aten::"):
            count, aten_until = count + 1, end
        elif index + 1 == len(found) or found[index + 1]["ts"] >= end:
            count += 1
    return count
