"""Small policies with gradients for tests of ``PolicyOptimizer``, and AdamW in float64 to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vpo_engine.config import MemoryConfig, OptimizerConfig
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
    """Return the weights that ``run`` would make from the same gradients without rounding."""
    exact = [nn.Parameter(start.double()) for start in starts]
    plain = torch.optim.AdamW(exact, lr=1e-4, weight_decay=0.01)
    for step in range(steps):
        for parameter, gradient in zip(exact, gradients(network, step), strict=True):
            parameter.grad = gradient.double()
        plain.step()
    return [parameter.detach() for parameter in exact]
