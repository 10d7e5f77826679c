"""The exact 8-bit reference: encoding and decoding one tensor of weights, on every backend that runs here.

``pytest bench/test_delta.py`` measures the CPU, or the GPU if there is one. Both passes write to tensors
that exist already, as in the reference store. GB/s is the bytes that a pass must move over its median seconds. Beside
it stands the rate at which this machine copies as many bytes in the same run. On a GPU the seconds of encoding include
the host's wait for the number of spilled elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from measure import Call, copy_bytes_per_second, device, device_seconds, footprint, on_gpu, rotation_length
from rows import quantiles
from torch import Tensor
from vpo_kernels import OrderedDelta, available_backends, decode_delta, encode_delta

SHAPES = [(1152, 1152), (4608, 1152), (64, 1024, 1024)]
LARGE = SHAPES[-1]
DRIFT = 1.5e-4  # rms over 200 steps at lr 1e-5
STD = 0.02  # of weights
BACKENDS = ["reference", "native", "triton"]


@dataclass(frozen=True)
class Weights:
    reference: Tensor
    policy: Tensor
    delta: OrderedDelta
    out: Tensor  # bfloat16, to decode into


@dataclass
class Case:
    """Cold copies of one tensor of weights and of its reference."""

    shape: tuple[int, ...]
    sets: list[Weights] = field(default_factory=list)

    def fill(self) -> None:
        generator = torch.Generator(device()).manual_seed(0)
        policy = STD * torch.randn(self.shape, generator=generator, device=device())
        reference = policy + DRIFT * torch.randn(self.shape, generator=generator, device=device())
        policy, reference = policy.bfloat16(), reference.bfloat16()
        delta = encode_delta(reference, policy)
        for _ in range(rotation_length(7 * policy.numel())):
            copies = OrderedDelta(*(tensor.clone() for tensor in delta))
            self.sets.append(Weights(reference.clone(), policy.clone(), copies, torch.zeros_like(policy)))

    def moved_bytes(self) -> int:
        """Return the bytes that either pass must move: policy, difference, reference and list of spilled elements."""
        first = self.sets[0]
        return first.policy.nbytes + first.reference.nbytes + sum(tensor.nbytes for tensor in first.delta)


def cold_call(kind: str, backend: str, sets: list[Weights]) -> Call:
    turn = itertools.cycle(sets)
    if kind == "encode":
        return Call(
            lambda: (next(turn),),
            lambda w: encode_delta(w.reference, w.policy, backend=backend, out=w.delta.difference),
        )
    return Call(lambda: (next(turn),), lambda w: decode_delta(w.delta, w.policy, out=w.out, backend=backend))


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if request.param == LARGE and not on_gpu():
        pytest.skip("64 Mi weights are measured on GPUs only, whose caches hold a layer of the usual size")
    case = Case(request.param)
    case.fill()
    yield case
    case.sets.clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_delta(benchmark, add_row, case: Case, kind: str, backend: str) -> None:
    if reason := available_backends(device())[backend]:
        pytest.skip(f"backend {backend}: {reason}")
    call = cold_call(kind, backend, case.sets)
    rounds = call.rounds()
    benchmark.pedantic(call.run_and_wait, setup=lambda: (call.prepare(), {}), rounds=rounds)
    if benchmark.disabled:
        return
    host = quantiles(benchmark.stats.stats.data)
    seconds = quantiles(device_seconds(call, rounds)) if on_gpu() else host
    used, moved = footprint(cold_call(kind, backend, case.sets[:1])), case.moved_bytes()
    numbers = {
        **seconds,
        "peak_bytes": used.peak_bytes,
        "kernels" if on_gpu() else "operators": used.items,
        "moved_bytes": moved,
        "spilled": case.sets[0].delta.index.numel(),
        "bytes_per_second": moved / seconds["seconds"],
        "copy_bytes_per_second": copy_bytes_per_second(moved),
    }
    if on_gpu():
        numbers["host_seconds"] = host["seconds"]
    description = {"shape": "x".join(map(str, case.shape)), "pass": kind, "implementation": backend}
    add_row("delta", description, numbers, device())
