"""Rollout: N candidates for every prompt, in one batched denoising loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.config import RolloutConfig
from vpo_engine.protocols import Network, TextEmbedding, VideoModel
from vpo_engine.seeding import normal


@torch.no_grad()
def sample_candidates(
    model: VideoModel,
    network: Network,
    text: TextEmbedding,
    positions: Sequence[int],
    config: RolloutConfig,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Latents float32 [P, N, C, T, H, W] sampled by ``network`` for the P prompts embedded in ``text``.

    The noise of a candidate is a function of (seed, position of its prompt in the stream, candidate number)
    alone. ``config.rows`` bounds how many candidates go through the network at once; it does not change what
    is sampled beyond the batch dependence of the matrix products.
    """
    noise = torch.cat(
        [
            normal((config.candidates, *model.latent_shape), seed, "rollout", position)
            for position in positions
        ]
    )
    rows_of_text = text.repeat_interleave(config.candidates)
    rows = config.rows or len(noise)
    parts = [
        model.sample(
            network,
            noise[start : start + rows].to(device),
            rows_of_text[slice(start, start + rows)],
            steps=config.steps,
            guidance=config.guidance,
        )
        for start in range(0, len(noise), rows)
    ]
    return torch.cat(parts).unflatten(0, (len(positions), config.candidates))
