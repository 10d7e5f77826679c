"""The paired loss on this machine: every backend that runs here, beside eager and compiled torch.

``pytest bench/test_loss.py`` measures the CPU, or the GPU if there is one. The largest shape needs VPO_BENCH_LARGE=1 on
a CPU. GB/s is the bytes that any implementation of a pass must move, over its median seconds. Beside it stands the
rate at which this machine copies as many bytes in the same run.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from eager_dpo import eager_dpo_loss
from measure import Call, copy_bytes_per_second, device, device_seconds, footprint, on_gpu, rotation_length
from rows import quantiles
from torch import Tensor
from vpo_kernels import available_backends, paired_dpo_loss

LARGE = (1, 64 * 2**20)
SETS = 4096  # of inputs, at most: beyond it, making tensors would take longer than measuring
SHAPES = [
    (2, 4, 5, 4, 4),
    (16, 4, 5, 4, 4),
    (1, 4, 10, 30, 53),
    (8, 4, 10, 30, 53),
    (1, 4, 20, 90, 160),
    LARGE,
]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, f32 targets": (torch.bfloat16, torch.float32),
    "f32": (torch.float32, torch.float32),
}
PASSES = ["forward", "backward", "both"]
BACKENDS = ["reference", "native", "triton"]

Loss = Callable[..., Tensor]


@dataclass
class Case:
    """Cold inputs of one shape and dtypes, and the eager loss compiled for them."""

    shape: tuple[int, ...]
    dtypes: str
    compiled: Loss | None = None
    compile_seconds: float = 0.0
    sets: list[list[Tensor]] = field(default_factory=list)

    def fill(self) -> None:
        """Make policies near their references, as in training, and equal copies of them elsewhere in memory."""
        prediction, target = DTYPES[self.dtypes]
        generator = torch.Generator(device()).manual_seed(0)

        def normal() -> Tensor:
            return torch.randn(self.shape, generator=generator, device=device())

        targets = [normal(), normal()]
        references = [each + 0.5 * normal() for each in targets]
        policies = [each + 0.02 * normal() for each in references]
        first = [each.to(prediction) for each in (*policies, *references)] + [
            each.to(target) for each in targets
        ]
        for _ in range(min(SETS, rotation_length(sum(each.nbytes for each in first)))):
            copies = [each.clone() for each in first]
            self.sets.append([*(each.requires_grad_() for each in copies[:2]), *copies[2:]])

    def moved_bytes(self, kind: str) -> int:
        """Return the bytes that a pass must move: six tensors forward; policies, targets and gradients backward."""
        policy, target = self.sets[0][0].nbytes, self.sets[0][4].nbytes
        forward, backward = 4 * policy + 2 * target, 4 * policy + 2 * target
        return {"forward": forward, "backward": backward, "both": forward + backward}[kind]

    def compile(self) -> Loss:
        """Return eager torch compiled for this shape alone, forward and backward; it is compiled once."""
        if self.compiled is None:
            torch.compiler.reset()
            start = time.perf_counter()
            compiled = torch.compile(eager_dpo_loss, dynamic=False)
            gradients(compiled, self.sets[0])
            self.compile_seconds = time.perf_counter() - start
            self.compiled = compiled
        return self.compiled


def gradients(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*tensors), tensors[:2])


def cold_call(loss: Loss, kind: str, sets: list[list[Tensor]]) -> Call:
    """Return the pass over one set after the other. A backward pass is that of a forward pass one rotation before."""
    turn = itertools.cycle(sets)
    if kind == "forward":
        return Call(lambda: tuple(next(turn)), loss)
    if kind == "both":
        return Call(lambda: (next(turn),), lambda tensors: gradients(loss, tensors))
    waiting = deque((loss(*tensors), tensors[:2]) for tensors in sets[1:])

    def prepare() -> tuple[Tensor, list[Tensor]]:
        tensors = next(turn)
        waiting.append((loss(*tensors), tensors[:2]))
        return waiting.popleft()

    return Call(prepare, torch.autograd.grad)


@pytest.fixture(scope="module")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give torch.compile an empty cache and warm it up; return the reason if nothing can be compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        try:
            torch.compile(torch.sin)(torch.ones(64, device=device()))
        except RuntimeError as error:
            yield f"torch.compile does not work here: {error}"
        else:
            yield ""


@pytest.fixture(scope="module", params=itertools.product(SHAPES, DTYPES), ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    shape, dtypes = request.param
    if shape == LARGE and not on_gpu() and os.environ.get("VPO_BENCH_LARGE") != "1":
        pytest.skip("64 Mi elements want 8 GiB and minutes on a CPU; set VPO_BENCH_LARGE=1")
    case = Case(shape, dtypes)
    case.fill()
    yield case
    case.sets.clear()


def choose(name: str, case: Case, request: pytest.FixtureRequest) -> Loss:
    """Return the implementation, or skip with the reason why it does not run here."""
    if name == "eager":
        return eager_dpo_loss
    if name == "compile":
        if reason := request.getfixturevalue("inductor"):
            pytest.skip(reason)
        return case.compile()
    if reason := available_backends(device())[name]:
        pytest.skip(f"backend {name}: {reason}")
    return lambda *tensors: paired_dpo_loss(*tensors, backend=name).loss


@pytest.mark.parametrize("implementation", ["eager", "compile", *BACKENDS])
@pytest.mark.parametrize("kind", PASSES)
def test_paired_loss(benchmark, add_row, case: Case, request, kind: str, implementation: str) -> None:
    loss = choose(implementation, case, request)
    call = cold_call(loss, kind, case.sets)
    rounds = call.rounds()
    benchmark.pedantic(call.run_and_wait, setup=lambda: (call.prepare(), {}), rounds=rounds)
    if benchmark.disabled:
        return
    host = quantiles(benchmark.stats.stats.data)
    seconds = quantiles(device_seconds(call, rounds)) if on_gpu() else host
    used = footprint(cold_call(loss, kind, case.sets[:1]))
    moved = case.moved_bytes(kind)
    numbers = {
        **seconds,
        "peak_bytes": used.peak_bytes,
        "kernels" if on_gpu() else "operators": used.items,
        "moved_bytes": moved,
        "bytes_per_second": moved / seconds["seconds"],
        "copy_bytes_per_second": copy_bytes_per_second(moved),
    }
    if on_gpu():
        numbers["host_seconds"] = host["seconds"]
    if implementation == "compile":
        numbers["compile_seconds"] = case.compile_seconds
    shape = "x".join(map(str, case.shape))
    description = {"shape": shape, "dtypes": case.dtypes, "pass": kind, "implementation": implementation}
    add_row("loss", description, numbers, device())
