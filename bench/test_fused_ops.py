"""The fused ops at STDiT3-XL/2's sizes in bfloat16: their kernels beside eager and compiled plain torch.

``pytest bench/test_fused_ops.py --record`` on a GPU gives the results by which the table in
``vpo_kernels/fused_ops.py`` is filled; ``python bench/gpu_measure.py rule`` says how. Without a GPU only the plain
formula runs, once at a tiny size, and no result is recorded: neither seconds nor bytes of a CPU say anything about the
choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from measure import Call, copy_bytes_per_second, device, device_seconds, footprint, rotation_length
from rows import quantiles
from torch import Tensor
from vpo_kernels.gated_residual import gated_residual
from vpo_kernels.modulated_norm import modulated_norm
from vpo_kernels.qk_norm_rope import qk_norm_rope
from vpo_kernels.temporal_attention import temporal_attention

HEADS, D = 16, 72
SIZES = {"240p x 34": (2, 10, 15 * 27), "720p x 68": (1, 20, 45 * 80)}  # samples, latent frames, patches
TINY = {"tiny": (1, 2, 3)}
ON_GPU = device().type == "cuda"

Operation = Callable[..., Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16).requires_grad_()


def _modulated_norm(samples: int, frames: int, patches: int) -> list[Tensor]:
    channels = HEADS * D
    return [_normal(samples, frames, patches, channels), *(_normal(samples, 1, 1, channels) for _ in "ab")]


def _gated_residual(samples: int, frames: int, patches: int) -> list[Tensor]:
    x, gate, _ = _modulated_norm(samples, frames, patches)
    return [x, gate, _normal(samples, frames, patches, HEADS * D)]


def _qk_norm_rope(samples: int, frames: int, patches: int) -> list[Tensor]:
    angles = torch.rand(frames, 1, D // 2, device=device())
    tables = [angles.cos().bfloat16(), angles.sin().bfloat16()]
    return [_normal(samples * patches, frames, HEADS, D), _normal(D), *tables]


def _temporal_attention(samples: int, frames: int, patches: int) -> list[Tensor]:
    return [_normal(samples * patches, frames, HEADS, D) for _ in "qkv"]


@dataclass(frozen=True)
class Subject:
    """An operation, its inputs, and the number of token tensors [B, T, S, C] that a pass must read and write."""

    operation: Operation
    inputs: Callable[[int, int, int], list[Tensor]]
    forward: int
    backward: int


SUBJECTS = {
    "modulated_norm": Subject(modulated_norm, _modulated_norm, forward=2, backward=3),
    "gated_residual": Subject(gated_residual, _gated_residual, forward=3, backward=3),
    "qk_norm_rope": Subject(qk_norm_rope, _qk_norm_rope, forward=2, backward=3),
    "temporal_attention": Subject(temporal_attention, _temporal_attention, forward=4, backward=7),
}


@dataclass
class Case:
    name: str
    size: str
    sets: list[list[Tensor]] = field(default_factory=list)
    grad: Tensor | None = None

    def fill(self) -> None:
        """Make cold inputs: a rotation of equal sets that no cache holds."""
        first = SUBJECTS[self.name].inputs(*{**SIZES, **TINY}[self.size])
        self.sets.append(first)
        for _ in range(rotation_length(sum(t.nbytes for t in first)) - 1 if ON_GPU else 0):
            self.sets.append([t.detach().clone().requires_grad_(t.requires_grad) for t in first])
        self.grad = torch.randn_like(SUBJECTS[self.name].operation(*first))

    def call(self, operation: Operation, kind: str) -> Call:
        turn = itertools.cycle(self.sets)
        if kind == "forward":
            return Call(lambda: tuple(next(turn)), operation)

        def both(*tensors: Tensor) -> object:
            leaves = [tensor for tensor in tensors if tensor.requires_grad]
            return torch.autograd.grad(operation(*tensors), leaves, self.grad)

        return Call(lambda: tuple(next(turn)), both)

    def moved_bytes(self, kind: str) -> int:
        subject = SUBJECTS[self.name]
        tensors = subject.forward + (subject.backward if kind == "both" else 0)
        return tensors * self.sets[0][0].nbytes


def kept_bytes(call: Call) -> int:
    """Return the bytes allocated by a forward pass with its graph: the output, and what is saved beyond the inputs."""
    arguments = call.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = call.run(*arguments)
    after = torch.cuda.memory_allocated()
    del result
    return after - before


@pytest.fixture(
    scope="module",
    params=itertools.product(SUBJECTS, SIZES if ON_GPU else TINY),
    ids=lambda parameters: "-".join(parameters),
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(*request.param)
    case.fill()
    yield case
    case.sets.clear()


def choose(implementation: str, operation: Operation) -> Operation:
    def plain(*tensors: Tensor) -> Tensor:
        return operation(*tensors, backend="reference")

    if implementation == "eager":
        return plain
    if not ON_GPU:
        pytest.skip(f"{implementation} is measured on a CUDA device; there is none")
    if implementation == "triton":
        return lambda *tensors: operation(*tensors, backend="triton")
    torch.compiler.reset()
    return torch.compile(plain, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("implementation", ["eager", "compile", "triton"])
@pytest.mark.parametrize("kind", ["forward", "both"])
@pytest.mark.benchmark(group="fused ops")
def test_fused_op(benchmark, add_row, case: Case, kind: str, implementation: str) -> None:
    call = case.call(choose(implementation, SUBJECTS[case.name].operation), kind)
    if not ON_GPU:
        benchmark.pedantic(call.run, args=call.prepare(), rounds=1)
        return
    rounds = call.rounds()
    benchmark.pedantic(call.run_and_wait, setup=lambda: (call.prepare(), {}), rounds=rounds)
    if benchmark.disabled:
        return
    used, moved = footprint(call), case.moved_bytes(kind)
    numbers = {
        **quantiles(device_seconds(call, rounds)),
        "host_seconds": quantiles(benchmark.stats.stats.data)["seconds"],
        "peak_bytes": used.peak_bytes,
        "kernels": used.items,
        "moved_bytes": moved,
        "copy_bytes_per_second": copy_bytes_per_second(moved),
    }
    numbers["bytes_per_second"] = moved / numbers["seconds"]
    if kind == "forward":
        numbers["kept_bytes"] = kept_bytes(call)
    description = {"operation": case.name, "size": case.size, "pass": kind, "implementation": implementation}
    add_row("fused_ops", description, numbers, device())
