"""Train the sprites world's image scorer on single frames, drawn at random from clips as of ``train_rewards``.

It learns what one frame can show: blur, destruction, colour and shape. It does not learn flicker, jitter, freezing
or the direction. One kind of destroyed clips is left out, frames of many clips in disorder, since each of its frames
shows a whole sprite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.sprites.optimizers import MuonAndAdam
from tools.sprites.train_rewards import (
    LEARNING_RATES,
    WRECKS,
    Batch,
    Progress,
    RoundTrip,
    draw_pool,
)
from vpo_engine.data.sprites.damage import KINDS
from vpo_engine.rewards.sprites_networks import FrameNetwork

POOL = 3840
"""Training clips, a multiple of 256."""
FRAMES_PER_STEP = 256
STEPS = 1000
SEED = 2001
DEFECTS = [KINDS.index("blur"), len(KINDS)]
"""Columns of ``Batch.defects`` that a single frame can show: blur and the degree of destruction."""


def train_image(
    seed: int = SEED, round_trip: RoundTrip | None = None, progress: Progress | None = None
) -> FrameNetwork:
    """Train the image scorer from scratch, in about four minutes on one core. The same seed gives the same weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = FrameNetwork()
    optimizer = MuonAndAdam(network, STEPS, *LEARNING_RATES)
    pool = draw_pool(POOL, generator, round_trip, [kind for kind in WRECKS if kind != "shuffled"])
    for step in range(STEPS):
        loss = _loss(network, pool, generator)
        optimizer.step(loss)
        if progress is not None:
            progress(step + 1, STEPS, loss.item())
    return network.eval().requires_grad_(False)


def _loss(network: FrameNetwork, pool: Batch, generator: torch.Generator) -> Tensor:
    """Return the cross-entropy of the defects (soft targets), colour and shape of frames drawn from the pool.

    Half of the frames are mirrored. The more strongly a clip changes identity, the less its colour and shape count.
    """
    count, frames = pool.videos.shape[:2]
    clip = torch.randint(count, (FRAMES_PER_STEP,), generator=generator)
    images = pool.videos[clip, torch.randint(frames, (FRAMES_PER_STEP,), generator=generator)]
    mirrored = torch.rand(FRAMES_PER_STEP, 1, 1, 1, generator=generator) < 0.5
    defects, colour, shape = network(torch.where(mirrored, images.flip(2), images))
    loss = F.binary_cross_entropy_with_logits(
        defects, pool.defects[clip][:, DEFECTS], weight=pool.defect_weight[clip][:, DEFECTS], reduction="sum"
    )
    loss = loss / FRAMES_PER_STEP
    shown, weight = pool.attributes[clip], pool.attribute_weight[clip]
    for column, (logits, index) in enumerate(((colour, shown.colour), (shape, shown.shape))):
        loss = loss + (F.cross_entropy(logits, index, reduction="none") * weight[:, column]).mean()
    return loss
