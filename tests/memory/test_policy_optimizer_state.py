"""The state of ``PolicyOptimizer``, the order and memory of its steps, and several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_case import ALL_MODES, SHAPES, assert_equal, gradients, optimizer_of, policy, run
from process_group import run_in_group
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.rounding import hold_in_bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("weights", "bits"), ALL_MODES)
def test_a_resumed_run_equals_the_uninterrupted_one(
    weights: str, bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole, half = policy(weights, dtype), policy(weights, dtype)
    uninterrupted, first = optimizer_of(whole, weights, bits), optimizer_of(half, weights, bits)
    run(uninterrupted, whole, range(8))
    run(first, half, range(5))
    save_file({name: tensor.clone() for name, tensor in first.state_dict().items()}, tmp_path / "optimizer")
    resumed = nn.ParameterList(parameter.detach().clone() for parameter in half.parameters())
    second = optimizer_of(resumed, weights, bits)
    second.load_state_dict(load_file(tmp_path / "optimizer"))
    assert second.steps == 5
    run(second, resumed, range(5, 8))
    assert_equal(whole, resumed)
    one, other = uninterrupted.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_loaded_state_is_a_copy() -> None:
    network, other = policy("fp32_master"), policy("fp32_master")
    first, second = optimizer_of(network, "fp32_master", 8), optimizer_of(other, "fp32_master", 8)
    run(first, network, range(2))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second.load_state_dict(first.state_dict())
    run(second, other, range(2))
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in saved.items())


def test_random_numbers_depend_on_the_seed_alone() -> None:
    ends = []
    for seed in (0, 0, 1):
        network = policy("stochastic_rounding")
        run(optimizer_of(network, "stochastic_rounding", seed=seed), network, range(2))
        ends.append(network)
    assert_equal(ends[0], ends[1])
    assert not torch.equal(ends[0][0], ends[2][0])


def test_every_parameter_is_rounded_with_random_numbers_of_its_own() -> None:
    network = policy("stochastic_rounding", shapes=[(64, 64)] * 2)
    with torch.no_grad():
        network[1].copy_(network[0])
    optimizer = optimizer_of(network, "stochastic_rounding")
    optimizer.begin(1e-4)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    assert not torch.equal(network[0], network[1])


def test_a_gradient_that_was_left_is_not_added_to_the_next() -> None:
    network = policy("float32")
    optimizer = optimizer_of(network)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.begin(1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())


def altered(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in {**state, name: value}.items() if tensor is not None}


def test_states_of_another_setup_are_refused_and_change_nothing() -> None:
    network = policy("fp32_master")
    optimizer = optimizer_of(network, "fp32_master", 8)
    run(optimizer, network, range(2))
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    stochastic = policy("stochastic_rounding")
    wrong = {
        r"saved with memory.weights=stochastic_rounding, memory.optimizer_bits=32 and 3 parameters, but this run has "
        r"memory.weights=fp32_master, memory.optimizer_bits=8 and 3": optimizer_of(
            stochastic, "stochastic_rounding"
        ).state_dict(),
        r"fp32_master, memory.optimizer_bits=8 and 2 parameters, but": optimizer_of(
            policy("fp32_master", shapes=SHAPES[:2]), "fp32_master", 8
        ).state_dict(),
        r"state 0\.state1: \(80, 64\), but parameter 0 of shape \(64, 80\) needs": altered(
            state, "0.state1", state["0.state1"].T
        ),
        r"state 0\.absmax2: nothing, but parameter 0 of shape \(64, 80\) needs \(20,\)": altered(
            state, "0.absmax2", None
        ),
        r"state 1\.master: nothing, but parameter 1": altered(state, "1.master", None),
        r"state 2\.absmax1: \(1,\), but parameter 2 .* needs nothing": {**state, "2.absmax1": torch.ones(1)},
        r"has no 'setup' or no 'steps': another program or an older version": altered(state, "setup", None),
    }
    for text, given in wrong.items():
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(given)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state_dict().items())


@pytest.mark.parametrize(("weights", "bits"), ALL_MODES)
def test_a_parameter_changes_only_inside_the_context_of_the_reference(weights: str, bits: int) -> None:
    network = policy(weights)
    seen: list[int] = []
    everything = list(network.parameters())
    values = [parameter.detach().clone() for parameter in everything]

    @contextmanager
    def preserve(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        (parameter,) = parameters
        number = next(number for number, one in enumerate(everything) if one is parameter)
        assert all(torch.equal(a, b) for a, b in zip(everything, values, strict=True))
        yield
        values[number] = parameter.detach().clone()
        seen.append(number)

    run(optimizer_of(network, weights, bits, preserve), network, range(2))
    assert seen == [0, 1, 2, 0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(everything, values, strict=True))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_refused_before_anything_changes(bad: float, clip: float | None) -> None:
    network = policy("fp32_master")
    optimizer = optimizer_of(network, "fp32_master", clip=clip)
    run(optimizer, network, range(1))
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    network[2].grad = torch.full_like(network[2], bad)
    with pytest.raises(
        ValueError, match=r"gradient norm is (nan|inf) at optimizer step 2; the policy was not"
    ):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state_dict().items())


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32() -> None:
    network = policy("stochastic_rounding", torch.bfloat16)
    optimizer = optimizer_of(network, "stochastic_rounding", clip=1.0)
    optimizer.begin(1e-4)
    for parameter, gradient in zip(network.parameters(), gradients(network, 0), strict=True):
        parameter.grad = gradient
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(network, 0)))
    assert optimizer.step() == pytest.approx(exact, rel=1e-6)


class LiveBytes(TorchDispatchMode):
    """The most bytes at once of storages made inside, those of ``known`` tensors apart."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self._alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {
            ref: size for ref, size in self._alive.items() if not ref.expired() and ref not in self._known
        }
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


@pytest.mark.parametrize(
    ("weights", "buffers"), [("float32", 2), ("fp32_master", 3), ("stochastic_rounding", 4)]
)
def test_a_step_needs_a_few_buffers_of_the_largest_parameter(weights: str, buffers: int) -> None:
    """Two in which AdamW makes its denominator; the float32 gradient; the passing float32 weight."""
    shapes = [(100, 100), (150, 100), *[(100, 100)] * 6]
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    network = policy(weights, dtype, shapes)
    optimizer = optimizer_of(network, weights)
    run(optimizer, network, range(1))
    for parameter, gradient in zip(network.parameters(), gradients(network, 1), strict=True):
        parameter.grad = gradient
    known = [*network.parameters(), *(p.grad for p in network.parameters()), *optimizer.tensors()]
    with LiveBytes(known) as live:
        optimizer.step()
    assert buffers * 4 * 15000 <= live.peak <= buffers * 4 * 15000 + 1024


def chain(weights: str, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(70, 70) for _ in range(layers)))
    hold_in_bfloat16(network, weights, torch.float32)  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(("weights", "bits"), ALL_MODES)
def test_stepping_in_the_backward_pass_is_the_same_step(weights: str, bits: int) -> None:
    ordinary, early = chain(weights), chain(weights)
    waiting: list[int] = []

    def preserve(parameters: Sequence[nn.Parameter]) -> Any:
        waiting.append(sum(p.grad is not None for p in early.parameters()))
        return nullcontext()

    pairs = [
        (ordinary, optimizer_of(ordinary, weights, bits)),  # type: ignore[arg-type]
        (early, optimizer_of(early, weights, bits, preserve, in_backward=True)),  # type: ignore[arg-type]
    ]
    for step in range(3):
        inputs = torch.randn(9, 70, generator=torch.Generator().manual_seed(step))
        norms = []
        for network, optimizer in pairs:
            optimizer.begin(1e-4)
            network(inputs).square().mean().backward()
            norms.append(optimizer.step())
            assert optimizer.steps == step + 1
        assert norms[0] == norms[1] > 0
        assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), early.parameters(), strict=True))
    one, other = (optimizer.state_dict() for _, optimizer in pairs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert max(waiting) <= 1  # a layer's bias may wait for its weight, nothing else
    assert all(parameter.grad is None for parameter in early.parameters())


def test_gradients_that_are_not_finite_in_the_backward_pass_say_what_was_done() -> None:
    network = chain("float32")
    optimizer = optimizer_of(network, in_backward=True)  # type: ignore[arg-type]
    optimizer.begin(1e-4)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with pytest.raises(
        NotFiniteError,
        match=r"norm is nan at optimizer step 1; with memory.step_in_backward=true part of the policy has changed",
    ):
        (network(torch.ones(1, 70)).sum() * math.nan).backward()
    assert optimizer.steps == 0
    assert all(torch.equal(one, two) for one, two in zip(before, network.parameters(), strict=True))


def test_a_second_backward_pass_in_one_step_is_an_error() -> None:
    network = chain("float32")
    optimizer = optimizer_of(network, in_backward=True)  # type: ignore[arg-type]
    optimizer.begin(1e-4)
    network(torch.ones(1, 70)).sum().backward()
    with pytest.raises(AssertionError, match="a second backward pass"):
        network(torch.ones(1, 70)).sum().backward()


def step_in_a_group() -> None:
    processes = Processes.start("cpu")
    for weights, bits in ALL_MODES:
        network = policy(weights)
        optimizer = optimizer_of(network, weights, bits, clip=0.5)
        for step in range(3):
            optimizer.begin(1e-3)
            own = gradients(network, 10 * step + processes.rank)
            for parameter, gradient in zip(network.parameters(), own, strict=True):
                parameter.grad = gradient
            processes.average_gradients(network.parameters())
            optimizer.step()
        weights_here = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        everywhere = processes.gather(weights_here[None])
        assert torch.equal(everywhere[0], everywhere[1]), (weights, bits)
        assert not torch.equal(everywhere[0][: 64 * 80], policy(weights)[0].flatten())
    processes.stop()


@pytest.mark.long
def test_two_processes_have_the_same_weights_in_every_mode(tmp_path: Path) -> None:
    run_in_group(tmp_path, 2, step_in_a_group)
