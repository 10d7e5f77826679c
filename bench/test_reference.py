"""Measure the bytes of each storage of the reference and its noise in the margin, on the sprites policy and its pairs.

The noise of a storage is the margin with the stored reference minus the margin with a float32 copy of the same policy,
on the same pairs, times and noise. Right after a refresh it is the whole margin. It stays the same while the policy
trains, since a margin is the policy's part minus the reference's. The margin of 200 optimizer steps is given for
comparison. One training serves all storages; weights are float32 (storages round them) or on bfloat16's grid
(fp32_master).
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from vpo_kernels import paired_dpo_loss

from vpo_engine.build import build_model, build_prompts, build_reward
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.method import embed_prompts
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.objectives.dpo import MicroBatch
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import Network, ReferenceStore, TextEmbedding
from vpo_engine.reference.store import Storage, build_reference

STEPS, PROMPTS, BATCH = 200, 16, 4
STORAGES: dict[str, tuple[Storage, ...]] = {
    "float32": ("copy", "bf16", "int8"),
    "fp32_master": ("copy", "bf16", "int8", "exact8"),
}


def samples(config: Config, model: OpenSora, count: int) -> MicroBatch:
    """Make pairs of the policy's best and worst candidates for ``count`` prompts, by the sprites reward, without ties.

    Every timestep of every pair is a sample.
    """
    train, _ = build_prompts(config)
    prompts = [train[index] for index in range(count)]
    model.prepare(prompts)
    alone = Processes(0, 1, torch.device("cpu"))
    algorithm = OnlineVPO(
        config, model, build_reward(config, alone.device), build_reference("copy", model.network), alone
    )
    found = algorithm.sampler.sample(embed_prompts(model, prompts, range(count)))
    pairs, objective = algorithm.selector.pairs(algorithm.selector.choose(found)), algorithm.objective
    every = range(len(pairs) * config.objective.timesteps_per_pair)
    return objective.micro_batch(pairs, 0, every, objective.timesteps(pairs, 0, every))


def part_of(batch: MicroBatch, which: slice | Tensor) -> MicroBatch:
    """Return some samples of a batch whose pairs all weigh the same."""
    text, times, noise = batch.text[which], batch.times[which], batch.noise[which]
    return MicroBatch(batch.winner[which], batch.loser[which], text, times, noise, None)


def predictions(model: OpenSora, network: Network, batch: MicroBatch) -> tuple[Tensor, ...]:
    noised = torch.cat(
        [model.add_noise(one, batch.noise, batch.times) for one in (batch.winner, batch.loser)]
    )
    both_texts = TextEmbedding.cat([batch.text, batch.text])
    return model.predict(network, noised, batch.times.repeat(2), both_texts).chunk(2)


def loss(model: OpenSora, reference: Network, batch: MicroBatch, beta: float):
    frozen = predictions(model, reference, batch)
    policy = predictions(model, model.network, batch)
    return paired_dpo_loss(
        *policy,
        *frozen,
        batch.winner,
        batch.loser,
        beta=beta,
        target_noise=batch.noise,
        target_scales=model.target_scales(batch.times),
    )


@torch.no_grad()
def margins(
    model: OpenSora, references: Mapping[str, ReferenceStore], batch: MicroBatch
) -> dict[str, Tensor]:
    """Return margins, float64 [samples], at beta 1; they are proportional to beta."""
    parts = [part_of(batch, slice(start, start + BATCH)) for start in range(0, len(batch.times), BATCH)]
    return {
        name: torch.cat([loss(model, reference, part, 1.0).margin.double() for part in parts])
        for name, reference in references.items()
    }


def train(
    config: Config, model: OpenSora, references: Mapping[str, ReferenceStore], batch: MicroBatch, steps: int
) -> None:
    """Train by DPO on the pairs, ``BATCH`` samples a step, against the copy."""
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    preserve = references.get("exact8", references["copy"]).preserve
    optimizer = PolicyOptimizer(
        parameters, config.optimizer, config.memory, seed=config.seed, preserve_reference=preserve
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.begin(config.optimizer.lr)
        which = torch.randperm(len(batch.times), generator=random)[:BATCH]
        part = part_of(batch, which)
        loss(model, references["copy"], part, config.objective.beta).loss.backward()
        optimizer.step()


@pytest.mark.benchmark(group="fidelity of the reference")
@pytest.mark.parametrize("weights", STORAGES)
def test_reference_storage(weights: str, benchmark, add_row) -> None:
    torch.manual_seed(0)
    steps, prompts = (2, 2) if benchmark.disabled else (STEPS, PROMPTS)
    config = load_config(None, [f"memory.weights={weights}"])
    model = build_model(config, Processes.start("cpu"))
    references = {storage: build_reference(storage, model.network) for storage in STORAGES[weights]}
    batch = samples(config, model, prompts)
    fresh = margins(model, references, batch)
    assert fresh["copy"].count_nonzero() == 0
    benchmark.pedantic(train, args=(config, model, references, batch, steps), rounds=1)
    later = margins(model, references, batch)
    assert torch.equal(later.get("exact8", later["copy"]), later["copy"])
    for storage in references:
        noise = later[storage] - later["copy"]
        torch.testing.assert_close(noise, fresh[storage], rtol=1e-3, atol=1e-6)
    if benchmark.disabled:
        return
    for storage, reference in references.items():
        numbers = {
            "bytes_per_block_weight": reference.bytes_per_weight,
            "bytes_per_weight": reference.nbytes / sum(p.numel() for p in model.network.parameters()),
            "outliers": reference.outliers,
        }
        for beta in (config.objective.beta, 500.0, 5000.0):
            numbers |= {
                f"noise_at_beta_{beta:.0f}": beta * float(fresh[storage].std()),
                f"margin_at_beta_{beta:.0f}": beta * float(later["copy"].std()),
            }
        case = {"weights": weights, "storage": storage, "rows": str(len(batch.times)), "steps": str(steps)}
        add_row("reference", case, numbers, torch.device("cpu"))
