"""The paired loss on this machine: forward and backward at latent sizes of 240p and 720p clips.

Run as ``pytest bench/``. Every row names its shape and dtype; ``extra_info`` holds the bytes that one pass must read,
so that a rate can be compared with the machine's copy rate, measured in the same run.
"""

from __future__ import annotations

import pytest
import torch
from vpo_kernels import paired_dpo_loss

SHAPES = {"240p x 34": (1, 4, 10, 30, 53), "720p x 68": (1, 4, 20, 90, 160)}


def make(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(6)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.benchmark(group="paired loss, forward and backward")
def test_forward_and_backward(benchmark, size: str, dtype: torch.dtype) -> None:
    tensors = make(SHAPES[size], dtype)
    benchmark.extra_info["bytes_read"] = sum(tensor.nbytes for tensor in tensors)

    def step() -> None:
        tensors[0].grad = tensors[1].grad = None
        paired_dpo_loss(*tensors).loss.backward()

    benchmark.pedantic(step, rounds=10, warmup_rounds=2)


@pytest.mark.benchmark(group="copy ceiling")
def test_copy(benchmark) -> None:
    source = torch.randn(16 * 2**20)
    target = torch.empty_like(source)
    benchmark.extra_info["bytes_read"] = source.nbytes
    benchmark.pedantic(lambda: target.copy_(source), rounds=10, warmup_rounds=2)
