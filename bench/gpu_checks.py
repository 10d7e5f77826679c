"""The checks that need a GPU, in order of worth, and what each of them needs; ``bench/on_gpu.py`` runs them.

    python bench/gpu_checks.py SYMBOL ...     # says of each symbol whether it can be imported here

A symbol is ``module`` or ``module:attribute``; ``cuda`` stands for a CUDA device that torch can use.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

CUDA = "cuda"
ROWS = "{rows}"
"""In a command, the folder that takes the check's rows."""


@dataclass(frozen=True)
class Check:
    """A command that is run by itself.

    name: what ``--only`` takes. why: what its result decides. command: arguments of the Python interpreter; ``ROWS``
    among them is replaced. needs: symbols that must be importable. seconds: an estimate, with the start
    of the interpreter and compilation; a check is ended after twice as long. topic: of the rows that it writes.
    """

    name: str
    why: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    seconds: float
    topic: str = ""


TORCH = (CUDA, "torch:compile")
TRITON = (*TORCH, "triton:jit")
PYTEST = (*TRITON, "pytest:main")
BENCHMARK = (*PYTEST, "pytest_benchmark.fixture:BenchmarkFixture")
ENGINE = (
    "vpo_engine.build:build_model",
    "vpo_engine.models.opensora.model:OpenSora",
    "diffusers:AutoencoderKL",
)
_GPU_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
_KERNEL_TESTS = (*_GPU_TESTS, "--confcutdir=tests/kernels")  # which need no package of the engine
_BENCH = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rows", ROWS)
_MEASURE = ("bench/gpu_measure.py",)
_LARGE_LOSS = "(67108864 or 160) and not f32"

CHECKS = (
    Check(
        "kernels",
        "every Triton kernel computes what its formula in float64 gives, forward and backward",
        (*_MEASURE, "kernels"),
        TRITON,
        60,
    ),
    Check(
        "loss-tests",
        "the paired loss passes its tests on the GPU, in graphs and without waiting too",
        (*_KERNEL_TESTS, "tests/kernels/test_paired_dpo_gpu.py"),
        PYTEST,
        90,
    ),
    Check(
        "delta-tests",
        "the exact 8-bit reference gives its bits back on the GPU",
        (*_KERNEL_TESTS, "tests/kernels/test_ordered_delta_gpu.py"),
        PYTEST,
        40,
    ),
    Check(
        "engine-tests",
        "graphs replay a step bit for bit, offloads give the same gradients, and no sampling step waits",
        (*_GPU_TESTS, "tests/memory", "tests/rollout"),
        (*PYTEST, *ENGINE, "peft:LoraConfig"),
        60,
    ),
    Check(
        "loss",
        "bandwidth and launches of the paired loss at 720p and at 64 Mi elements, in bfloat16",
        (*_BENCH, "bench/test_loss.py", "-k", _LARGE_LOSS),
        BENCHMARK,
        60,
        "loss",
    ),
    Check(
        "fused-720p",
        "which fused operations beat torch.compile at 720p x 68",
        (*_BENCH, "bench/test_fused_ops.py", "-k", "720p"),
        BENCHMARK,
        75,
        "fused_ops",
    ),
    Check(
        "memory-720p",
        "measured against planned peak of full fine-tuning at 720p x 68, with the recommended settings",
        (*_MEASURE, "memory", "--rows", ROWS),
        (*TRITON, *ENGINE, "matplotlib.pyplot:subplots"),
        90,
        "gpu_memory",
    ),
    Check(
        "rollout-240p",
        "how many times faster than a plain sampler the rollout is at 240p x 34",
        (*_BENCH, "bench/test_rollout.py", "-k", "full_size and 240p"),
        (*BENCHMARK, *ENGINE),
        75,
        "rollout",
    ),
    Check(
        "rollout-720p",
        "the same at 720p x 68",
        (*_BENCH, "bench/test_rollout.py", "-k", "full_size and 720p"),
        (*BENCHMARK, *ENGINE),
        100,
        "rollout",
    ),
    Check(
        "network",
        "seconds and utilisation of a prediction and of a training pass, 240p x 34 and 720p x 68",
        (*_MEASURE, "network", "--rows", ROWS),
        TRITON,
        45,
        "network",
    ),
    Check(
        "sampling-step",
        "what compiled blocks and CUDA graphs save of a sampling step at 240p x 34",
        (*_MEASURE, "sampling", "--rows", ROWS),
        TRITON,
        60,
        "sampling_step",
    ),
    Check(
        "sampling-copies",
        "time and error of the fp8 and int8 sampling copies at 240p x 34",
        (*_MEASURE, "copies", "--rows", ROWS),
        TRITON,
        40,
        "sampling_step",
    ),
    Check(
        "offload",
        "time and memory of offloading activations on streams of their own at 720p x 68; gradients are equal",
        (*_MEASURE, "offload", "--rows", ROWS),
        TRITON,
        60,
        "offload",
    ),
    Check(
        "step",
        "seconds and utilisation of each stage of a step of the sprites world",
        (*_BENCH, "bench/test_step.py"),
        (*BENCHMARK, *ENGINE),
        45,
        "step",
    ),
    Check(
        "fused-240p",
        "which fused operations beat torch.compile at 240p x 34",
        (*_BENCH, "bench/test_fused_ops.py", "-k", "240p"),
        BENCHMARK,
        75,
        "fused_ops",
    ),
    Check(
        "delta",
        "bandwidth and launches of encoding and decoding the exact 8-bit reference",
        (*_BENCH, "bench/test_delta.py"),
        BENCHMARK,
        40,
        "delta",
    ),
    Check(
        "memory-leanest",
        "measured against planned peak at 720p x 68 with the leanest settings",
        (*_MEASURE, "memory", "--method", "OnlineVPO, leanest", "--rows", ROWS),
        (*TRITON, *ENGINE, "matplotlib.pyplot:subplots", "bitsandbytes.optim:AdamW8bit"),
        90,
        "gpu_memory",
    ),
    Check(
        "loss-rest",
        "the paired loss at the other sizes and types",
        (*_BENCH, "bench/test_loss.py", "-k", f"not ({_LARGE_LOSS})"),
        BENCHMARK,
        180,
        "loss",
    ),
)


STAND_IN = """import json, sys, time
time.sleep(1)
name, topic, rows = sys.argv[1:]
print("stands in for", name)
if topic:
    row = {"topic": topic, "case": {"check": name}, "numbers": {"seconds": 1.0}, "environment": {"hardware": "none"}}
    open(f"{rows}/{topic}.jsonl", "w").write(json.dumps(row) + "\\n")
"""


def stand_in(check: Check) -> Check:
    """Return a check that sleeps for a second and writes a row of the topic, and needs no GPU."""
    command = ("-c", STAND_IN, check.name, check.topic, ROWS)
    needs = tuple(need for need in check.needs if need != CUDA)
    return dataclasses.replace(check, command=command, needs=needs, seconds=3.0)


def why_missing(symbol: str) -> str:
    """Return why a symbol cannot be imported here; "" if it can."""
    try:
        if symbol == CUDA:
            import torch

            built = f"torch {torch.__version__}"
            return "" if torch.cuda.is_available() else f"{built} finds no CUDA device"
        module, _, name = symbol.partition(":")
        found = importlib.import_module(module)
        if name and not hasattr(found, name):
            return f"{module} has no {name}"
    except Exception as error:  # a broken installation may raise anything, and is as good as none
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def main(symbols: Sequence[str]) -> int:
    for symbol in symbols:
        print("\n" + json.dumps([symbol, why_missing(symbol)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
