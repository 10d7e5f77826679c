"""The arithmetic of ``PolicyOptimizer`` in every mode, against torch, float64 and bitsandbytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from optimizer_case import ALL_MODES, ULP, assert_equal, float64_adamw, gradients, optimizer_of, policy, run
from torch import nn

from vpo_engine.build import build_model
from vpo_engine.config import Config, MemoryConfig, OptimizerConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.make_optimizer import make_optimizer
from vpo_engine.memory.moments import make_moments
from vpo_engine.memory.optimizer import PolicyOptimizer, learning_rate
from vpo_engine.memory.rounding import hold_in_bfloat16


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


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
def test_weights_that_are_kept_in_float32_are_stepped_as_float32_weights(weights: str) -> None:
    """Parameter 1 is kept; the others are rounded as without it, and only they have a master."""
    kept, plain, rounded = policy("float32"), policy("float32"), policy(weights)
    hold_in_bfloat16(kept, weights, torch.float32, ["1"])  # type: ignore[arg-type]
    optimizer = optimizer_of(kept, weights)
    run(optimizer, kept, range(5))
    run(optimizer_of(plain), plain, range(5))
    run(optimizer_of(rounded, weights), rounded, range(5))
    assert torch.equal(kept[1], plain[1])
    assert torch.equal(kept[0], rounded[0])
    assert not torch.equal(kept[1], rounded[1])
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert ("0.master" in state, "1.master" in state) == (weights == "fp32_master", False)
    resumed = copy.deepcopy(kept)
    hold_in_bfloat16(resumed, weights, torch.float32, ["1"])  # type: ignore[arg-type]
    other = optimizer_of(resumed, weights)
    other.load_state_dict(state)
    run(optimizer, kept, range(5, 8))
    run(other, resumed, range(5, 8))
    assert_equal(kept, resumed)


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


def test_a_warm_up_that_is_longer_than_the_run_ends_with_it() -> None:
    settings = OptimizerConfig(lr=1.0, warmup_steps=9)
    assert [learning_rate(settings, step, 3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_with_8_bit_moments_rate_betas_eps_and_decay_are_those_of_the_run() -> None:
    """Weights of fewer than 4096 elements keep moments of 32 bits, so that torch's AdamW makes the same steps."""
    settings = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.5}
    network, exact = (policy("float32", shapes=[(30, 40)]) for _ in range(2))
    optimizer = optimizer_of(network, bits=8, lr=1.0, **settings)
    plain = torch.optim.AdamW(exact.parameters(), lr=1.0, **settings)
    for step in range(4):
        rate = 1e-2 / (step + 1)
        optimizer.begin(rate)
        plain.param_groups[0]["lr"] = rate
        network[0].grad, exact[0].grad = (gradients(one, step)[0] for one in (network, exact))
        optimizer.step()
        plain.step()
    torch.testing.assert_close(network[0], exact[0], rtol=0, atol=1e-5)


def test_moments_of_8_bits_go_from_one_optimizer_to_another() -> None:
    """As those of a run that DeepSpeed divides do, whose steps are those of the undivided optimizer.

    Each rounding errs by at most 0.0071 of a block's largest magnitude, and four add up to less than 0.03.
    """
    random = torch.Generator().manual_seed(0)
    start, *given = (torch.randn(64, 128, generator=random) for _ in range(3))
    network, flat = nn.ParameterList([start.clone()]), nn.Parameter(start.clone())
    undivided = optimizer_of(network, bits=8, lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5)
    moments = make_moments(undivided._settings, 8, on_host=False)
    library = moments.optimizer([flat])
    for gradient in given:
        undivided.begin(1e-2)
        network[0].grad, flat.grad = gradient.clone(), gradient.clone()
        undivided.step()
        library.step()
    torch.testing.assert_close(flat, network[0], rtol=0, atol=1e-6)
    values, (first, second) = moments.read(library.state[flat]), given
    exact = {"state1": 0.2 * (0.8 * first + second), "state2": 0.05 * (0.95 * first**2 + second**2)}
    other = nn.Parameter(flat.detach().clone())
    again = make_moments(undivided._settings, 8, on_host=False)
    resumed = again.optimizer([other])
    again.set(resumed, other, 2, moments.unpack(moments.pack(values)))
    assert resumed.state[other]["step"] == 2
    for name, mean in exact.items():
        for found in (values[name], again.read(resumed.state[other])[name]):
            torch.testing.assert_close(found, mean, rtol=0, atol=0.05 * float(mean.abs().max()))
    other.grad = given[0].clone()
    resumed.step()
    assert resumed.state[other]["step"] == 3


def test_runs_of_other_seeds_round_otherwise(small: Callable[..., Config]) -> None:
    ends = []
    for seed in (3, 3, 4):
        config = small("memory.weights=stochastic_rounding", f"seed={seed}")
        network = policy("stochastic_rounding")
        optimizer = make_optimizer(config, network, Processes.start("cpu"), lambda _: nullcontext())
        optimizer.begin(1e-4)
        for parameter, gradient in zip(network.parameters(), gradients(network, 0), strict=True):
            parameter.grad = gradient
        optimizer.step()
        ends.append(network)
    assert_equal(ends[0], ends[1])
    assert not torch.equal(ends[0][0], ends[2][0])
