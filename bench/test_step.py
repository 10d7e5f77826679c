"""Measure a step of Algorithm 1 on the sprites world, with default settings: seconds by stage, and utilisation.

The GPU is measured if there is one, else the CPU.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from measure import device
from rows import quantiles

from vpo_engine.build import build_model, build_prompts, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.method import Step, embed_prompts
from vpo_engine.metrics.throughput import Throughput, count_row_flops, matrix_rate
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import build_reference

ROUNDS = 3


@pytest.mark.benchmark(group="one step of Algorithm 1")
def test_sprites_step(benchmark, add_row) -> None:
    config = load_config(None, [f"model.device={device().type}"])
    processes = Processes.start(device().type)
    model = build_model(config, processes)
    train, _ = build_prompts(config)
    prompts = [train[index] for index in range(config.pairs_per_step)]
    model.prepare(prompts)
    reward = build_reward(config, processes.device)
    algorithm = OnlineVPO(config, model, reward, build_reference("copy", model.network), processes)
    made: list[Step] = []

    def step() -> None:
        first = len(made) * len(prompts)
        positions = range(first, first + len(prompts))
        made.append(algorithm.step(embed_prompts(model, prompts, positions)))

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    measured = made[-ROUNDS:]
    stages = measured[0].seconds
    numbers = {
        f"{stage}_seconds": statistics.median(one.seconds[stage] for one in measured) for stage in stages
    }
    ceiling = matrix_rate(processes.device, getattr(torch, config.model.dtype))
    throughput = Throughput(config, count_row_flops(model, model.embed(prompts)), ceiling)
    shares = [throughput.utilisation(one.seconds, one.rows, len(one.pairs)) for one in measured]
    for name in shares[0]:
        stage = name.removeprefix("speed/").removesuffix("_mfu")
        numbers[f"{stage}_utilisation"] = statistics.median(share[name] for share in shares)
    case = {
        "world": "sprites",
        "pairs": str(config.pairs_per_step),
        "candidates": str(config.rollout.candidates),
    }
    add_row("step", case, {**quantiles(benchmark.stats.stats.data), **numbers}, processes.device)
