"""Candidates as the engine samples them, without a reward model, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.batches import Batches
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.rollout.sampler import CandidateSampler, Denoiser
from vpo_engine.selection import extremes
from vpo_engine.values import Candidate, Prompt
from vpo_engine.video_model import VideoModel

Judge = Callable[[Tensor], Tensor]
"""A function of latents [P, N, C, T, H, W] that returns the one deciding number per candidate, [P, N]."""


def sample_candidates(
    model: VideoModel,
    networks: tuple[Network, Network],
    text: TextEmbedding,
    positions: Sequence[int],
    config: RolloutConfig,
    seed: int,
    device: torch.device,
    judge: Judge | None = None,
    batches: Batches | None = None,
    attempt: int = 0,
) -> list[list[Candidate]]:
    """Return the candidates of the P prompts of ``text``; scored by ``judge`` as "judge", by zeros without one.

    ``networks``: the networks that sample in the first pass, and in the second if config.prune or explore asks for one.
    attempt: the candidates have the numbers attempt * N to (attempt + 1) * N - 1.
    """

    def score(latents: Tensor, *_: object) -> dict[str, Tensor]:
        return {"judge": torch.zeros(latents.shape[:2]) if judge is None else judge(latents)}

    sampler = CandidateSampler(
        config,
        seed,
        model.latent_shape,
        networks,
        lambda: None,
        model.start,
        Denoiser(model, batches or Batches(config.batch_limit), device),
        lambda texts: None,
        score,
        lambda scores, keep: extremes(scores["judge"], keep),
        Processes(0, 1, device),
        None if config.preview_frames is None else model.prefix(config.preview_frames)[0],
    )
    prompts = [Prompt("", text[row : row + 1], position) for row, position in enumerate(positions)]
    return sampler.sample(prompts, attempt)


def stacked(candidates: Sequence[Sequence[Candidate]]) -> Tensor:
    """Return the latents of candidates, [P, N, C, T, H, W]."""
    return torch.stack([torch.stack([candidate.latents for candidate in each]) for each in candidates])
