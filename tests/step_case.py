"""Steps of Algorithm 1 as tests make and read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import candidates
import torch
from candidates import Judge, stacked
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.method import Step, embed_prompts
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.values import Candidate, Choice, Pair, Prompt
from vpo_engine.video_model import VideoModel


def step_on(algorithm: OnlineVPO, texts: Sequence[str], positions: Sequence[int]) -> Step:
    """Make a step on prompts that the model has prepared, at these positions of the stream."""
    return algorithm.step(embed_prompts(algorithm.model, texts, positions))


def candidates_of(step: Step) -> Tensor:
    """Return the latents of all candidates, [P, N, C, T, H, W], of prompts that have equally many."""
    return torch.stack([torch.stack([each.latents for each in choice.candidates]) for choice in step.choices])


def scores_of(step: Step, dimension: str) -> Tensor:
    """Return a dimension's scores, float32 [P, N], of prompts that have equally many candidates."""
    return torch.tensor([[each.scores[dimension] for each in choice.candidates] for choice in step.choices])


def places_of(choices: Sequence[Choice]) -> tuple[list[int], list[int]]:
    """Return the places of winner and loser among the candidates of each prompt."""
    winners = [choice.candidates.index(choice.winner) for choice in choices]
    return winners, [choice.candidates.index(choice.loser) for choice in choices]


def pairs_of(winners: Tensor, losers: Tensor, text: TextEmbedding, positions: Sequence[int]) -> list[Pair]:
    """Return pairs of latents [P, C, T, H, W], with the embeddings of their prompts."""
    pairs = []
    for row, position in enumerate(positions):
        prompt = Prompt(f"prompt {row}", text[row : row + 1], position)
        winner, loser = (
            Candidate(prompt, number, side[row], {}) for number, side in enumerate((winners, losers))
        )
        pairs.append(Pair(winner, loser))
    return pairs


def sample_candidates(
    model: VideoModel,
    network: Network,
    text: TextEmbedding,
    positions: Sequence[int],
    config: RolloutConfig,
    seed: int,
    device: torch.device,
    judge: Judge | None = None,
    **options: Any,
) -> Tensor:
    """Return latents [P, N, C, T, H, W] that ``network`` samples; ``judge`` gives the scores, zeros without one.

    With config.prune or explore they are [P, keep, ...]: those that the judge's scores of the previews choose.
    options: of ``candidates.sample_candidates``.
    """
    networks = network, network
    return stacked(
        candidates.sample_candidates(model, networks, text, positions, config, seed, device, judge, **options)
    )


def times_and_noise(algorithm: OnlineVPO, positions: Sequence[int], update: int = 0) -> tuple[Tensor, Tensor]:
    """Return the times [P * draws] and noise [P * draws, C, T, H, W] that pairs at these positions learn from."""
    latents = torch.zeros(len(positions), *algorithm.model.latent_shape)
    text = TextEmbedding(torch.zeros(len(positions), 1, 1), torch.ones(len(positions), 1, dtype=torch.bool))
    pairs = pairs_of(latents, latents, text, positions)
    samples = range(len(positions) * algorithm.config.objective.timesteps_per_pair)
    times = algorithm.objective.timesteps(pairs, update, samples)
    return times, algorithm.objective.micro_batch(pairs, update, samples, times).noise
