"""Measure the seconds of each stage of a step of Algorithm 1 on the sprites world, with default settings."""

from __future__ import annotations

import statistics

import pytest
from rows import quantiles

from vpo_engine.build import build_model, build_prompts, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.online_vpo import OnlineVPO, embed_prompts
from vpo_engine.reference.store import build_reference

ROUNDS = 3


@pytest.mark.benchmark(group="one step of Algorithm 1")
def test_sprites_step(benchmark, add_row) -> None:
    config = load_config(None)
    processes = Processes.start("cpu")
    model = build_model(config, processes)
    train, _ = build_prompts(config)
    prompts = [train[index] for index in range(config.pairs_per_step)]
    model.prepare(prompts)
    reward = build_reward(config, processes.device)
    algorithm = OnlineVPO(config, model, reward, build_reference("copy", model.network), processes)
    stages: list[dict[str, float]] = []

    def step() -> None:
        first = len(stages) * len(prompts)
        positions = range(first, first + len(prompts))
        stages.append(algorithm.step(embed_prompts(model, prompts, positions)).seconds)

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    measured = stages[-ROUNDS:]
    numbers = {f"{stage}_seconds": statistics.median(row[stage] for row in measured) for stage in measured[0]}
    case = {
        "world": "sprites",
        "pairs": str(config.pairs_per_step),
        "candidates": str(config.rollout.candidates),
    }
    add_row("step", case, {**quantiles(benchmark.stats.stats.data), **numbers}, processes.device)
