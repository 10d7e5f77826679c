"""DeepSpeed's ZeRO over several processes trains what one process trains, at every stage."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zero_runs
from process_group import run_in_group
from torch import nn
from zero_runs import (
    CLIPPED,
    HALF,
    LORA,
    MICRO,
    SEQUENTIAL,
    UNCLIPPED,
    assert_same_training,
    divided_fully,
    load,
    make,
    make_steps,
    save,
    weights_of,
    zero,
)

from vpo_engine.config import OptimizerConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.moments import WideMoments
from vpo_engine.memory.optimizer_state import STEP, StateFormat
from vpo_engine.memory.zero import ZeroOptimizer

# Not imported here: that takes seconds in every worker, also where these tests are left out.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

BOUND = 1e-6
"""In float32: see ``assert_same_training``."""

Case = tuple[tuple[str, ...], tuple[str, ...]]
"""Settings of both runs, and how the second one divides the work."""


SHARED = {
    "0": ("full", "adapter sequential", "micro-batches"),
    "1": ("full sequential", "adapter", "micro-batches"),
}
"""Both stages average whole gradients after the backward passes, so that each way to make these is in one of them."""


def cases(folder: Path) -> dict[str, Case]:
    three = zero(3, divided_fully(folder))
    offload = "distributed.offload_optimizer=true"
    found: dict[str, Case] = {}
    for name, division in {"0": zero(0), "1": zero(1), "2": zero(2), "3": three}.items():
        ways: dict[str, tuple[str, ...]] = {
            "full": (),
            "full sequential": (*SEQUENTIAL, *UNCLIPPED),
            "adapter": (*LORA, *CLIPPED),
            "adapter sequential": (*LORA, *SEQUENTIAL),
            "micro-batches": (*SEQUENTIAL, *MICRO),
        }
        found |= {f"{name} {way}": (ways[way], division) for way in SHARED.get(name, ways)}
    return found | {
        "1 offload": ((), (*zero(1), offload)),
        "2 offload": (MICRO, (*zero(2), offload)),
        "3 offload": (SEQUENTIAL, (*three, offload)),
        "3 checkpointed": (
            ("memory.activation_checkpointing=block", "memory.mlp_chunks=2", "objective.micro_batch_size=1"),
            three,
        ),
        "3 refreshed in 8 bits": (("reference.storage=int8",), three),
        "3 refreshed in bfloat16": (("reference.storage=bf16",), three),
    }


def in_group(folder: Path, names: Sequence[str]) -> None:
    processes = Processes.start("cpu")
    for name in names:
        settings, division = cases(folder)[name]
        shared = zero_runs.THREE if processes.count == 3 else ()
        found = zero_runs.run((*settings, *division, *shared), processes)
        torch.save(found, folder / f"{name}_{processes.rank}.pt")
    processes.stop()


@functools.cache
def run_alone(settings: tuple[str, ...]) -> dict[str, Any]:
    return zero_runs.run(settings, Processes.start("cpu"))


def check_against_one_process(folder: Path, count: int, names: Sequence[str]) -> None:
    run_in_group(folder, count, in_group, folder, names)
    for name in names:
        settings, _ = cases(folder)[name]
        alone = run_alone((*settings, *(zero_runs.THREE if count == 3 else ())))
        first, *others = [
            torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(count)
        ]
        storage = next((each.partition("=")[2] for each in settings if "storage" in each), "copy")
        assert_same_training(alone, first, BOUND, name, storage)
        for other in others:
            assert torch.equal(first["after"], other["after"]), name
            assert torch.equal(first["reference"], other["reference"]), name
            assert first["metrics"] == other["metrics"], name
        if not settings:  # two rows at least go through the networks, so that equal weights round alike
            ages = [each["reference_age"] for each in first["metrics"]]
            assert ages == [1, 0, 1], name
            assert first["metrics"][0]["margin"] == first["metrics"][2]["margin"] == 0.0, name
            assert first["metrics"][1]["margin"] != 0.0, name


@pytest.mark.long
@pytest.mark.parametrize("stages", ["012", "3"])
def test_two_processes_train_what_one_does(tmp_path: Path, stages: str) -> None:
    names = [name for name in cases(tmp_path) if name[0] in stages]
    check_against_one_process(tmp_path, 2, names)


@pytest.mark.long
def test_a_process_without_a_pair_takes_part(tmp_path: Path) -> None:
    """In stage 3 it makes passes that must add nothing; those of a tie add nothing anyway if pairs weigh their gap."""
    check_against_one_process(
        tmp_path, 3, ["1 full sequential", "2 micro-batches", "3 full", "3 micro-batches"]
    )


@pytest.mark.long
def test_one_process_trains_the_same_with_and_without_deepspeed(tmp_path: Path) -> None:
    names = ["0 full", "1 adapter", "2 micro-batches", "3 adapter sequential"]
    check_against_one_process(tmp_path, 1, names)


ALIKE = ("pairs_per_step=6", "optimizer.eps=1e-3", "optimizer.lr=1e-3", "optimizer.clip=0.1")
"""Moments that matter: a step moves a weight by lr g / (|g| + eps), and so rounding of the clipped gradients, at most
1e-6 of 0.1, by at most 1e-7."""


def go_on(
    folder: Path, settings: Sequence[str], tasks: Sequence[tuple[int | None, str, Sequence[str]]]
) -> None:
    """For each (stage, name, others): make two steps, save them as ``name`` and make the third; then load each of
    ``others`` and make the third. Keep the weights. Stage None: without DeepSpeed; name "": only load."""
    processes = Processes.start("cpu")
    for stage, saved, loaded in tasks:
        own = settings if stage is None else (*settings, *zero(stage, divided_fully(folder)))
        for name in (saved, *loaded) if saved else loaded:
            algorithm = make(own, processes)
            if not (folder / name).exists():
                make_steps(algorithm, [0, 1])
                save(algorithm, folder / name, 2)
            else:
                load(algorithm, folder / name)
                assert algorithm.optimizer_steps == 2
            start = weights_of(algorithm)
            make_steps(algorithm, [2])
            file = folder / f"{name} at {processes.count} by {stage} ({processes.rank}).pt"
            torch.save((start, weights_of(algorithm)), file)
    processes.stop()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_run_goes_on_with_another_division_of_the_work(tmp_path: Path, kind: str) -> None:
    """From 1 process to 2, from 2 to 1 and to 3, from stage 1 to 3 and back, and with and without DeepSpeed."""
    settings = (*ALIKE, *(LORA if kind == "adapter" else ()))
    go_on(tmp_path, settings, [(None, "one", [])])
    in_two = [(3, "by 3", ["one"]), (1, "by 1", ["by 3"]), (3, "", ["by 1"])]
    run_in_group(tmp_path, 2, go_on, tmp_path, settings, in_two)
    run_in_group(tmp_path, 3, go_on, tmp_path, settings, [(2, "", ["by 1", "by 3", "one"])])
    go_on(tmp_path, settings, [(None, "", ["by 1", "by 3"])])
    files = sorted(tmp_path.glob("* at *.pt"))
    assert len(files) == 1 + 2 * 5 + 3 * 3 + 2
    start, end = torch.load(tmp_path / "one at 1 by None (0).pt", weights_only=True)
    assert float((end - start).abs().max()) > 50 * BOUND
    for file in files:
        begun, ended = torch.load(file, weights_only=True)
        torch.testing.assert_close(begun, start, rtol=0, atol=BOUND, msg=lambda m, f=file: f"{f}: {m}")
        torch.testing.assert_close(ended, end, rtol=0, atol=BOUND, msg=lambda m, f=file: f"{f}: {m}")


def keep_bits(folder: Path, cases: Sequence[Sequence[str]]) -> None:
    """Resume runs with the division they were saved with; keep the weights of both ways. Masters begin unrounded."""
    processes = Processes.start("cpu")
    for number, settings in enumerate(cases):
        plain = make([each for each in settings if not each.startswith("distributed.")], processes)
        one, again = make(settings, processes), make(settings, processes)
        begun = one.optimizer.state_dict()
        for name, value in plain.optimizer.state_dict().items():
            assert not processes.first or torch.equal(begun[name], value), (number, name)
        make_steps(one, [0, 1])
        save(one, folder / f"case {number}", 2)
        load(again, folder / f"case {number}")
        make_steps(one, [2])
        make_steps(again, [2])
        torch.save((weights_of(one), weights_of(again)), folder / f"{number} {processes.rank}.pt")
    processes.stop()


@pytest.mark.long
def test_a_resumed_run_has_the_bits_of_one_that_went_on(tmp_path: Path) -> None:
    """Also with bfloat16 weights and float32 masters. Moments of 8 bits are rounded once more: to within their step."""
    adam, three = ("optimizer.eps=1e-8", "optimizer.lr=1e-3"), divided_fully(tmp_path)
    exact = [
        (*adam, *zero(2)),
        (*adam, *zero(3, three)),
        (*adam, *HALF, *zero(1)),
        (*adam, *HALF, *zero(2), "reference.storage=exact8"),
        (*adam, *HALF, *zero(3, three)),
    ]
    eight = [("memory.optimizer_bits=8", *zero(1)), ("memory.optimizer_bits=8", *zero(3, three))]
    run_in_group(tmp_path, 2, keep_bits, tmp_path, [*exact, *eight])
    for number in range(len(exact) + len(eight)):
        for rank in range(2):
            one, again = torch.load(tmp_path / f"{number} {rank}.pt", weights_only=True)
            if number < len(exact):
                assert torch.equal(one, again), number
            else:
                torch.testing.assert_close(again, one, rtol=0, atol=2e-3)


def refuse_infinity(folder: Path) -> None:
    """In one process the gradient is not finite, although the loss is."""
    processes = Processes.start("cpu")
    for stage in range(4):
        algorithm = make(zero(stage, divided_fully(folder)), processes)
        before = weights_of(algorithm)
        if processes.first:
            algorithm.objective._add_gradient = lambda loss, one=algorithm: one.optimizer.backward(
                loss * torch.inf
            )
        with pytest.raises(
            NotFiniteError, match=r"not finite at optimizer step 1; the policy was not changed"
        ):
            make_steps(algorithm, [0])
        assert torch.equal(weights_of(algorithm), before)
        assert algorithm.optimizer_steps == 0
    processes.stop()


@pytest.mark.long
def test_a_gradient_that_is_not_finite_in_one_process_changes_nothing_in_any(tmp_path: Path) -> None:
    run_in_group(tmp_path, 2, refuse_infinity, tmp_path)


class Stepped:
    """Stands in for DeepSpeed's engine; a step changes the weights."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights = weights

    def buffered_allreduce_fallback(self) -> None: ...

    @torch.no_grad()
    def step(self) -> None:
        for weight in self._weights:
            weight.add_(1.0)

    def get_global_grad_norm(self) -> float:
        return 2.0

    def was_step_applied(self) -> bool:
        return True


@pytest.mark.parametrize(("stage", "kept"), [(0, 2), (1, 2), (2, 2), (3, 0)])
def test_the_reference_keeps_its_values_while_deepspeed_changes_the_weights(stage: int, kept: int) -> None:
    """Not with stage 3, which no such reference goes with."""
    weights, seen = [nn.Parameter(torch.zeros(2)) for _ in range(2)], list[nn.Parameter]()
    for weight in weights:
        weight.grad = torch.ones(2)

    @contextmanager
    def preserve(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        assert not any(bool(weight.any()) for weight in weights)
        yield
        assert all(bool(weight.all()) for weight in weights)
        seen.extend(parameters)

    optimizer: Any = object.__new__(ZeroOptimizer)
    optimizer._engine, optimizer._stage, optimizer._preserve_reference = Stepped(weights), stage, preserve
    optimizer.parameters, optimizer.steps = weights, 0
    assert optimizer.step() == pytest.approx(2.0)
    assert optimizer.steps == 1
    assert [id(one) for one in seen] == [id(one) for one in weights[:kept]]


def test_weights_that_were_stepped_at_different_times_are_refused() -> None:
    optimizer: Any = object.__new__(ZeroOptimizer)
    optimizer._format, optimizer.steps = StateFormat("float32", 32, [(2,), (2,)]), 0
    state = optimizer._format.header(3)
    for number, step in enumerate((3.0, 2.0)):
        entry = {STEP: torch.tensor(step), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        state |= {f"{number}.{name}": value for name, value in entry.items()}
    with pytest.raises(
        ValueError, match=r"were stepped 2 and others that were stepped 3 times; .*data_parallel"
    ):
        optimizer.load_state_dict(state)
    assert optimizer.steps == 0


def test_a_process_that_steps_no_part_of_a_weight_joins_in_gathering_the_moments() -> None:
    """A small adapter leaves nothing for the last of many processes; the others have made three steps."""
    gathered: list[torch.Tensor] = []

    def add(values: torch.Tensor) -> torch.Tensor:
        gathered.append(values)
        return values

    optimizer: Any = object.__new__(ZeroOptimizer)
    optimizer._format, optimizer.steps = StateFormat("float32", 32, [(2,)]), 3
    optimizer.parameters, optimizer._shapes = [nn.Parameter(torch.zeros(2))], [(2,)]
    optimizer._masters, optimizer._stage = False, 1
    optimizer._moments = WideMoments(OptimizerConfig(), fused=False)
    optimizer._pieces, optimizer._shards, optimizer._places = [None], [], {}
    optimizer._library = SimpleNamespace(state={})
    optimizer._processes = SimpleNamespace(
        first=False, device=torch.device("cpu"), sum=add, largest=lambda number: max(number, 3)
    )
    optimizer.state_dict()
    assert [tuple(values.shape) for values in gathered] == [(2,), (2,)], "both moments"
