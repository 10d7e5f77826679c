"""Seconds per stage of one whole step of Algorithm 1 on the sprites world, at its default settings."""

from __future__ import annotations

import pytest

from vpo_engine.build import build_model, build_prompts, build_reward
from vpo_engine.config import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import CopiedReference


@pytest.mark.benchmark(group="one step of Algorithm 1")
def test_sprites_step(benchmark) -> None:
    config = load_config(None)
    processes = Processes.start("cpu")
    model = build_model(config, processes)
    train, _ = build_prompts(config)
    prompts = [train[index] for index in range(config.pairs_per_step)]
    model.prepare(prompts)
    reward = build_reward(config, processes.device)
    algorithm = OnlineVPO(config, model, reward, CopiedReference(model.network), processes)
    text = model.embed(prompts)
    seconds: list[dict[str, float]] = []

    def step() -> None:
        first = len(seconds) * len(prompts)
        positions = range(first, first + len(prompts))
        seconds.append(algorithm.step(prompts, text, positions).seconds)

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    for stage in seconds[0]:
        benchmark.extra_info[f"seconds/{stage}"] = min(row[stage] for row in seconds[1:])
