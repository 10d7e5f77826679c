"""Measure the bytes of each storage of the reference and its noise in the margin, on the sprites policy and its pairs.

The noise of a storage is the margin with the stored reference minus the margin with a float32 copy of the same policy,
on the same pairs, times and noise. Right after a refresh it is the whole margin. It stays the same while the policy
trains, since a margin is the policy's part minus the reference's. The margin of 200 optimizer steps is given for
comparison. One training serves all storages; weights are float32 (storages round them) or on bfloat16's grid (masters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from vpo_kernels import paired_dpo_loss

from vpo_engine.build import build_model, build_prompts, build_reward
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.objectives.dpo import DPO
from vpo_engine.objectives.pairs import select_pairs
from vpo_engine.protocols import Network, ReferenceStore, TextEmbedding
from vpo_engine.reference.store import Storage, build_reference
from vpo_engine.rewards.combine import combine
from vpo_engine.rollout.candidates import sample_candidates

STEPS, PROMPTS, ROWS = 200, 16, 4
STORAGES: dict[str, tuple[Storage, ...]] = {
    "float32": ("copy", "bf16", "int8"),
    "masters": ("copy", "bf16", "int8", "exact8"),
}


@dataclass(frozen=True)
class Rows:
    """Pairs with their times and noise; a pair has a row for each of its times."""

    winner: Tensor
    loser: Tensor
    text: TextEmbedding
    times: Tensor
    noise: Tensor

    def __getitem__(self, which: slice) -> Rows:
        return Rows(
            self.winner[which], self.loser[which], self.text[which], self.times[which], self.noise[which]
        )


def pairs(config: Config, model: OpenSora, count: int) -> Rows:
    """Return the policy's best and worst candidates of ``count`` prompts by the sprites reward, without ties."""
    train, _ = build_prompts(config)
    prompts = [train[index] for index in range(count)]
    model.prepare(prompts)
    text, device = model.embed(prompts), torch.device("cpu")
    candidates = sample_candidates(
        model, model.network, text, range(count), config.rollout, config.seed, device
    )
    captions = [prompt for prompt in prompts for _ in range(config.rollout.candidates)]
    scores = build_reward(config, device).score(model.decode(candidates.flatten(0, 1)), captions)
    by_prompt = {name: score.unflatten(0, candidates.shape[:2]) for name, score in scores.items()}
    chosen = select_pairs(combine(by_prompt, config.reward.dimensions))
    times, noise = DPO(model, config.objective, 1.0, config.seed)._draws(range(count), device)
    row = torch.arange(count).repeat_interleave(config.objective.draws)
    row, keep = row[chosen.kept[row]], chosen.kept[row]
    return Rows(
        candidates[row, chosen.winner[row]],
        candidates[row, chosen.loser[row]],
        text[row],
        times[keep],
        noise[keep],
    )


def predictions(model: OpenSora, network: Network, rows: Rows) -> tuple[Tensor, ...]:
    noised = torch.cat([model.add_noise(one, rows.noise, rows.times) for one in (rows.winner, rows.loser)])
    both_texts = TextEmbedding.cat([rows.text, rows.text])
    return model.predict(network, noised, rows.times.repeat(2), both_texts).chunk(2)


def loss(model: OpenSora, reference: Network, rows: Rows, beta: float):
    frozen = predictions(model, reference, rows)
    policy = predictions(model, model.network, rows)
    return paired_dpo_loss(
        *policy,
        *frozen,
        rows.winner,
        rows.loser,
        beta=beta,
        target_noise=rows.noise,
        target_scales=model.target_scales(rows.times),
    )


@torch.no_grad()
def margins(model: OpenSora, references: Mapping[str, ReferenceStore], rows: Rows) -> dict[str, Tensor]:
    """Return margins, float64 [rows], for beta 1; margins are proportional to beta."""
    parts = [rows[slice(start, start + ROWS)] for start in range(0, len(rows.times), ROWS)]
    return {
        name: torch.cat([loss(model, reference, part, 1.0).margin.double() for part in parts])
        for name, reference in references.items()
    }


def train(
    config: Config, model: OpenSora, references: Mapping[str, ReferenceStore], rows: Rows, steps: int
) -> None:
    """Train by DPO on the pairs with the copied reference, ``ROWS`` rows per step."""
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    preserve = references.get("exact8", references["copy"]).following
    optimizer = PolicyOptimizer(
        parameters, config.optimizer, config.memory, seed=config.seed, following=preserve
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.begin(config.optimizer.lr)
        which = torch.randperm(len(rows.times), generator=random)[:ROWS]
        batch = Rows(
            rows.winner[which], rows.loser[which], rows.text[which], rows.times[which], rows.noise[which]
        )
        loss(model, references["copy"], batch, config.objective.beta).loss.backward()
        optimizer.step()


@pytest.mark.benchmark(group="fidelity of the reference")
@pytest.mark.parametrize("weights", STORAGES)
def test_reference_storage(weights: str, benchmark, add_row) -> None:
    torch.manual_seed(0)
    steps, prompts = (2, 2) if benchmark.disabled else (STEPS, PROMPTS)
    config = load_config(None, [f"memory.weights={weights}"])
    model = build_model(config, Processes.start("cpu"))
    references = {storage: build_reference(storage, model.network) for storage in STORAGES[weights]}
    rows = pairs(config, model, prompts)
    fresh = margins(model, references, rows)
    assert fresh["copy"].count_nonzero() == 0
    benchmark.pedantic(train, args=(config, model, references, rows, steps), rounds=1)
    later = margins(model, references, rows)
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
            "spilled": reference.spilled,
        }
        for beta in (config.objective.beta, 500.0, 5000.0):
            numbers |= {
                f"noise_at_beta_{beta:.0f}": beta * float(fresh[storage].std()),
                f"margin_at_beta_{beta:.0f}": beta * float(later["copy"].std()),
            }
        case = {"weights": weights, "storage": storage, "rows": str(len(rows.times)), "steps": str(steps)}
        add_row("reference", case, numbers, torch.device("cpu"))
