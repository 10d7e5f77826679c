"""Test the optimizer against float64, against the libraries' own optimizers, and across a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_in_group
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpo_engine.build import build_model
from vpo_engine.config import Config, MemoryConfig, OptimizerConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.memory.rounding import hold_in_bfloat16

SHAPES = ((64, 80), (80,), (3, 5, 7))
"""The first has enough elements (4096) for 8-bit moments, the others do not."""
ALL_MODES = [
    (weights, bits) for weights in ("float32", "fp32_master", "stochastic_rounding") for bits in (32, 8)
]
ULP = 2.0**-8
"""The distance of bfloat16 values in [0.5, 1)."""


def policy(
    weights: str, dtype: torch.dtype = torch.float32, shapes: Sequence[Any] = SHAPES
) -> nn.ParameterList:
    """Weights in (0.55, 0.95), so that 50 steps of 1e-4 stay between powers of two."""
    random = torch.Generator().manual_seed(1)
    network = nn.ParameterList(0.55 + 0.4 * torch.rand(shape, generator=random) for shape in shapes)
    hold_in_bfloat16(network, weights, dtype)  # type: ignore[arg-type]
    return network


def gradients(network: nn.ParameterList, step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    return [(0.01 * torch.randn(p.shape, generator=random) + 0.005).to(p.dtype) for p in network.parameters()]


def optimizer_of(
    network: nn.ParameterList,
    weights: str = "float32",
    bits: int = 32,
    preserve: Callable[..., Any] = lambda parameters: nullcontext(),
    seed: int = 0,
    in_backward: bool = False,
    **settings: Any,
) -> PolicyOptimizer:
    given = OptimizerConfig(**{"lr": 1e-4, "weight_decay": 0.01, "clip": None, **settings})
    memory = MemoryConfig(weights=weights, optimizer_bits=bits, step_in_backward=in_backward)  # type: ignore[arg-type]
    return PolicyOptimizer(list(network.parameters()), given, memory, seed=seed, preserve_reference=preserve)


def run(optimizer: PolicyOptimizer, network: nn.ParameterList, steps: range) -> None:
    for step in steps:
        optimizer.begin(optimizer._settings.lr)
        for parameter, gradient in zip(network.parameters(), gradients(network, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def assert_equal(one: nn.ParameterList, other: nn.ParameterList) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def float64_adamw(starts: Sequence[Tensor], network: nn.ParameterList, steps: int) -> list[Tensor]:
    """What ``run`` would make of these weights without rounding, from the same gradients."""
    exact = [nn.Parameter(start.double()) for start in starts]
    plain = torch.optim.AdamW(exact, lr=1e-4, weight_decay=0.01)
    for step in range(steps):
        for parameter, gradient in zip(exact, gradients(network, step), strict=True):
            parameter.grad = gradient.double()
        plain.step()
    return [parameter.detach() for parameter in exact]


@pytest.mark.parametrize("clip", [None, 0.3, 1e6])
def test_float32_is_plain_adamw_over_the_sprites_policy_bit_for_bit(
    small: Callable[..., Config], clip: float | None
) -> None:
    sides = [build_model(small(), Processes.start("cpu"), lambda text: None).network for _ in range(2)]
    one, other = (list(network.parameters()) for network in sides)
    settings = OptimizerConfig(lr=1e-3, weight_decay=0.01, clip=clip)
    optimizer = PolicyOptimizer(
        one, settings, MemoryConfig(), seed=0, preserve_reference=lambda parameters: nullcontext()
    )
    plain = torch.optim.AdamW(other, lr=1e-3, weight_decay=0.01)
    random = torch.Generator().manual_seed(0)
    for step in range(10):
        rate = 1e-3 / (step + 1)
        optimizer.begin(rate)
        plain.zero_grad(set_to_none=True)
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if number != 3:  # a parameter that the loss does not reach
                b.grad = torch.randn(b.shape, generator=random)
                a.grad = b.grad.clone()
        plain.param_groups[0]["lr"] = rate
        expected = torch.nn.utils.clip_grad_norm_(other, math.inf if clip is None else clip)
        plain.step()
        assert optimizer.step() == float(expected)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(parameter.grad is None for parameter in one)
    assert not any(name.startswith("3.") for name in optimizer.state_dict())


def arithmetic_error(steps: int) -> float:
    """Of float32 AdamW: per step two roundings of a weight below one, and an update off by 32 roundings of lr."""
    return steps * 2.0**-24 * (2 + 32 * 1e-4)


def test_float32_stays_within_its_rounding_of_float64() -> None:
    network = policy("float32")
    exact = float64_adamw([p.detach().clone() for p in network.parameters()], network, 50)
    run(optimizer_of(network), network, range(50))
    for parameter, value in zip(network.parameters(), exact, strict=True):
        assert (parameter - value).abs().max() <= arithmetic_error(50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masters_are_float32_and_the_weights_their_nearest_bfloat16(dtype: torch.dtype) -> None:
    unrounded = [p.detach().clone() for p in policy("float32").parameters()]
    network = policy("fp32_master", dtype)
    optimizer = optimizer_of(network, "fp32_master")
    exact = float64_adamw(unrounded, network, 50)
    run(optimizer, network, range(50))
    state = optimizer.state_dict()
    for number, (parameter, value) in enumerate(zip(network.parameters(), exact, strict=True)):
        master = state[f"{number}.master"]
        assert master.dtype == torch.float32
        assert (master - value).abs().max() <= arithmetic_error(50)
        assert parameter.dtype == dtype
        assert torch.equal(parameter, master.bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stochastic_weights_are_a_random_walk_around_float64(dtype: torch.dtype) -> None:
    """Each step adds an error of mean zero and variance q (1 - q) ulp^2, at most a quarter."""
    network = policy("stochastic_rounding", dtype, [(200, 100)])
    exact = float64_adamw([p.detach().clone() for p in network.parameters()], network, 50)
    run(optimizer_of(network, "stochastic_rounding"), network, range(50))
    (parameter,) = network.parameters()
    assert torch.equal(parameter.bfloat16().to(dtype), parameter)
    error = (parameter.double() - exact[0]) / ULP
    deviation = math.sqrt(50) / 2
    assert error.square().mean().sqrt() <= deviation
    assert abs(error.mean()) <= 5 * deviation / math.sqrt(error.numel())


def test_small_updates_are_lost_by_nearest_rounding_and_kept_on_average_by_stochastic() -> None:
    """At the paper's learning rate 1e-5 a weight near one moves by 1/400 of what bfloat16 can tell apart."""
    steps, rate = 50, 1e-5
    nearest, random, master = (
        policy(w, torch.bfloat16, [(200, 100)]) for w in ("fp32_master", "stochastic_rounding", "fp32_master")
    )
    before = nearest[0].detach().clone()
    plain = torch.optim.AdamW(nearest.parameters(), lr=rate, weight_decay=0.0)
    optimizers = [
        optimizer_of(random, "stochastic_rounding", lr=rate, weight_decay=0.0),
        optimizer_of(master, "fp32_master", lr=rate, weight_decay=0.0),
    ]
    for _ in range(steps):
        nearest[0].grad = torch.ones_like(before)
        plain.step()
        for network, optimizer in zip((random, master), optimizers, strict=True):
            optimizer.begin(rate)
            network[0].grad = torch.ones_like(before)
            optimizer.step()
    assert torch.equal(nearest[0], before)
    moved = random[0].double() - before.double()
    share = rate / ULP
    deviation = ULP * math.sqrt(steps * share * (1 - share))
    assert abs(moved.mean() + steps * rate) <= 5 * deviation / math.sqrt(moved.numel())
    unrounded = policy("float32", shapes=[(200, 100)])[0]
    travelled = optimizers[1].state_dict()["0.master"].double() - unrounded.double()
    assert (travelled + steps * rate).abs().max() <= arithmetic_error(steps)
    assert 0 < (master[0] != before).sum() < before.numel()


def test_8_bit_moments_stay_within_the_librarys_own_bound() -> None:
    """bitsandbytes tests lr 1e-3, weights of 0.1 and gradients of 0.01 for a mean error of 6e-5, 6e-4 relative, when
    both sides start each step from the same weights and moments."""
    from bitsandbytes.functional import dequantize_blockwise

    random = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(256, 1024, generator=random)
    network = nn.ParameterList([start.clone()])
    optimizer = optimizer_of(network, bits=8, lr=1e-3, weight_decay=0.0)
    exact = nn.Parameter(start.clone())
    plain = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    tables = optimizer._library._library.name2qmap  # type: ignore[attr-defined]
    for _ in range(50):
        optimizer.begin(1e-3)
        exact.grad = 0.01 * torch.randn(start.shape, generator=random)
        network[0].grad = exact.grad.clone()
        optimizer.step()
        plain.step()
        error = (network[0] - exact).abs()
        assert error.mean() < 6e-5
        assert (error / (exact.abs() + 1e-9)).mean() < 6e-4
        state = optimizer.state_dict()
        for name, number, table in (("exp_avg", 1, "dynamic"), ("exp_avg_sq", 2, "udynamic")):
            moment = dequantize_blockwise(
                state[f"0.state{number}"],
                absmax=state[f"0.absmax{number}"],
                code=tables[table],
                blocksize=256,
            )
            close = torch.isclose(plain.state[exact][name], moment, atol=3e-3, rtol=1e-3)
            assert (~close).sum() < 20
            plain.state[exact][name].copy_(moment)
        exact.data.copy_(network[0])


def test_bytes_of_moments_and_fp32_master_weights() -> None:
    large, elements = 64 * 80, 64 * 80 + 80 + 105
    small_ones = elements - large
    eight_bits = 2 * large + 2 * 4 * (large // 256) + 2 * 4 * small_ones
    for weights, bits in ALL_MODES:
        network = policy(weights)
        optimizer = optimizer_of(network, weights, bits)
        fp32_masters = 4 * elements if weights == "fp32_master" else 0
        assert optimizer.nbytes() == {"moments": 0, "fp32_master": fp32_masters}
        run(optimizer, network, range(1))
        assert optimizer.nbytes() == {
            "moments": 8 * elements if bits == 32 else eight_bits,
            "fp32_master": fp32_masters,
        }
        assert sum(t.numel() * t.element_size() for t in optimizer.tensors()) == sum(
            optimizer.nbytes().values()
        )


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
    (network(torch.ones(1, 70)).sum() * math.nan).backward()
    with pytest.raises(
        ValueError,
        match=r"norm is nan at optimizer step 1; with memory.step_in_backward=true part of the policy has "
        r"changed already: resume from the last checkpoint",
    ):
        optimizer.step()
    assert optimizer.steps == 0


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


def test_two_processes_have_the_same_weights_in_every_mode(tmp_path: Path) -> None:
    run_in_group(tmp_path, 2, step_in_a_group)
