"""The moving average of the policy's weights: its numbers, its types, and the weights that it leaves behind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpo_engine.config import EmaConfig, MemoryConfig, OptimizerConfig
from vpo_engine.memory.ema import PolicyAverage, effective_decay
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.memory.zero_average import DividedAverage

MODES = ("float32", "fp32_master", "stochastic_rounding")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def trained(
    weights: Any, decay: float, steps: int, dtype: torch.dtype = torch.bfloat16, on_host: bool = False
) -> tuple[nn.Module, PolicyAverage, list[list[Tensor]]]:
    """Make steps; return the network, its average, and the precise weights at the start and after every step."""
    policy = network()
    hold_in_bfloat16(policy, weights, dtype)
    parameters = list(policy.parameters())
    optimizer = PolicyOptimizer(
        parameters,
        OptimizerConfig(lr=0.05),
        MemoryConfig(weights=weights),
        seed=0,
        preserve_reference=lambda _: nullcontext(),
    )
    average = PolicyAverage(parameters, optimizer.precise_weights, EmaConfig(decay=decay, on_host=on_host))
    seen = [[one.detach().double() for one in optimizer.precise_weights()]]
    for step in range(steps):
        optimizer.begin(0.05)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(parameters[0])
        policy(x).square().sum().backward()
        optimizer.step()
        average.update()
        seen.append([one.detach().double() for one in optimizer.precise_weights()])
    return policy, average, seen


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_the_average_is_that_of_the_precise_weights(weights: str, decay: float) -> None:
    """Recomputed in float64. Each of six float32 updates adds a rounding of 2^-24 of the largest weight, twice."""
    steps = 6
    _, average, seen = trained(weights, decay, steps)
    expected = seen[0]
    for number, now in enumerate(seen[1:]):
        d = min(decay, (1 + number) / (10 + number))
        expected = [d * one + (1 - d) * other for one, other in zip(expected, now, strict=True)]
    assert average.updates == steps
    assert average.decay == min(decay, steps / (steps + 9))
    for found, exact, last in zip(average.tensors(), expected, seen[-1], strict=True):
        assert found.dtype == torch.float32
        assert bool(((found.double() - exact).abs() <= 2 * steps * 2.0**-24 * exact.abs().max()).all())
        assert not torch.allclose(found.double(), last, rtol=1e-4, atol=1e-4)


def test_with_fp32_master_weights_the_average_starts_at_and_follows_these() -> None:
    _, average, seen = trained("fp32_master", 0.5, 0)
    for found, unrounded, start in zip(average.tensors(), network().parameters(), seen[0], strict=True):
        assert torch.equal(found, unrounded)
        assert torch.equal(found.double(), start)
        assert not torch.equal(found, unrounded.bfloat16().float())


def test_on_the_host_it_is_the_same() -> None:
    one, other = (trained("fp32_master", 0.9, 3, on_host=place)[1].tensors() for place in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert {tensor.device.type for tensor in other} == {"cpu"}


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluations_see_the_average_and_training_goes_on_with_its_own_weights(
    weights: str, dtype: torch.dtype
) -> None:
    policy, average, _ = trained(weights, 0.9, 2, dtype)
    before = [one.detach().clone() for one in policy.parameters()]
    addresses = [one.data_ptr() for one in policy.parameters()]

    def look() -> None:
        with average.evaluated():
            for parameter, mean in zip(policy.parameters(), average.tensors(), strict=True):
                assert torch.equal(parameter, mean.to(parameter.dtype))
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), before, strict=True))
    assert addresses == [one.data_ptr() for one in policy.parameters()]  # CUDA graphs have captured these


def test_files_are_written_from_and_read_into_the_float32_averages() -> None:
    policy, average, _ = trained("fp32_master", 0.9, 2)
    before = [one.detach().clone() for one in policy.parameters()]
    means = [one.clone() for one in average.tensors()]
    with average.in_place():
        saved = {name: value.clone() for name, value in policy.state_dict().items()}
        assert all(torch.equal(one, mean) for one, mean in zip(saved.values(), means, strict=True))
    for mean in average.tensors():
        mean.zero_()
    with average.in_place():
        policy.load_state_dict(saved)
    assert all(torch.equal(one, mean) for one, mean in zip(average.tensors(), means, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), before, strict=True))
    assert {one.dtype for one in policy.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [(0.999, 0, 0.1), (0.999, 1, 2 / 11), (0.999, 89, 90 / 99), (0.999, 10**5, 0.999), (0.05, 0, 0.05)],
)
def test_the_decay_warms_up(decay: float, updates: int, expected: float) -> None:
    assert effective_decay(decay, updates) == expected


class Shards:
    """The part of an optimizer with divided weights that the average asks first."""

    def __init__(self, *shards: Tensor) -> None:
        self._shards = list(shards)

    def shards(self) -> list[Tensor]:
        return self._shards


@pytest.mark.parametrize("on_host", [False, True])
def test_an_average_lies_where_the_setting_says(on_host: bool) -> None:
    """Fake tensors may be on a GPU where there is none."""
    settings = EmaConfig(decay=0.9, on_host=on_host)
    with FakeTensorMode():
        weight = torch.empty(3, device="cuda")
        whole = PolicyAverage([], lambda: [weight], settings)
        divided = DividedAverage(Shards(weight), settings)  # type: ignore[arg-type]
        places = [one.device.type for average in (whole, divided) for one in average.tensors()]
    assert places == ["cpu" if on_host else "cuda"] * 2
