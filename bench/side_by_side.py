"""Two samplers of the same candidates in turn: their seconds per prompt, and how far their latents lie apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import synchronize
from rows import quantiles
from torch import Tensor

ROUNDS = 3


@torch.no_grad()
def compare(
    engine: Callable[[], Tensor],
    other: Callable[[], Tensor],
    prompts: int,
    tolerance: float,
    benchmark: Any,
    name: str,
) -> dict[str, float]:
    """Return the engine's seconds per prompt with quantiles, the other's as "{name}_seconds", and "times_faster".

    Both sample latents [P, N, C, T, H, W] of ``prompts`` prompts. They are asserted to differ by less than
    ``tolerance`` of their norm.
    """
    taken: dict[Callable[[], Tensor], list[float]] = {engine: [], other: []}

    def one_round() -> None:
        made = []
        for sampler, seconds in taken.items():
            synchronize()
            start = time.perf_counter()
            made.append(sampler())
            synchronize()
            seconds.append((time.perf_counter() - start) / prompts)
        off = (made[0] - made[1]).norm() / made[1].norm()
        assert off < tolerance, f"the samplers' latents differ by {off:.2g} of their norm"

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    mine, others = (quantiles(seconds[-ROUNDS:]) for seconds in taken.values())
    ratio = others["seconds"] / mine["seconds"]
    return {**mine, f"{name}_seconds": others["seconds"], "times_faster": ratio}
