"""A step traced with fake tensors, compared with the same step over tensors that have memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from vpo_engine.config import Config
from vpo_engine.planning.parts import materialise
from vpo_engine.planning.trace import trace_step

CPU = torch.device("cpu")


class NoFakes:
    """Stands for FakeTensorMode and does nothing."""

    def __init__(self, **_: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def assert_traced_as_real(config: Config, depth: int | None = None) -> None:
    """Assert that both traces agree in bytes and operations; with real tensors every block and every step runs."""
    fake, place = trace_step(config, on_gpu=False, depth=depth), "vpo_engine.planning.trace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{place}.FakeTensorMode", NoFakes)
        patch.setattr(f"{place}.repeated", lambda *_: nullcontext())
        patch.setattr(f"{place}.repeated_steps", lambda _: nullcontext())
        patch.setattr(f"{place}.materialise", _random)
        patch.setattr("vpo_engine.planning.parts.materialise", _random)
        torch.manual_seed(0)
        real = trace_step(config, on_gpu=False, depth=depth)
    assert fake.names == real.names
    for name in {"rollout", "update", "optimizer", "refresh"} & set(fake.names):
        assert fake.peak(name) == real.peak(name), name
        assert fake.flops(name) == real.flops(name), name


def _random(module: nn.Module, dtype: torch.dtype | None = None, device: torch.device = CPU) -> None:
    """Give a module weights through which gradients stay finite, and valid codes."""
    materialise(module, dtype, device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(0.0, 0.05) if tensor.is_floating_point() else tensor.random_()
