"""Classifier-free guidance: a prediction with the prompt, one without, and their combination."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.model_values import TextEmbedding

Branch = Callable[[Tensor, Tensor, TextEmbedding], Tensor]
"""A function of latents [B, C, T, H, W], t [B] and the text of B prompts that predicts [B, C, T, H, W]."""


def mixed(prompted: Tensor, unprompted: Tensor, guidance: float) -> Tensor:
    """Return the guided prediction from the two branches."""
    return unprompted + guidance * (prompted - unprompted)


def guided(
    branch: Branch,
    latents: Tensor,
    t: Tensor,
    text: TextEmbedding,
    null_text: Callable[[TextEmbedding], TextEmbedding],
    guidance: float,
    negative_first: bool = False,
) -> Tensor:
    """Return the guided prediction of B samples, both branches in one pass of 2 B; guidance 1 is the prompted branch.

    latents [B, C, T, H, W] at times t [B]; text of P prompts, each that of B / P samples next to each other.
    negative_first: the branch without the prompt is the first half of the pass.
    """
    texts = texts_of_pass(text, null_text, guidance, len(latents) // len(text), negative_first)
    return guided_pass(branch, latents, t, texts, guidance, negative_first)


def texts_of_pass(
    text: TextEmbedding,
    null_text: Callable[[TextEmbedding], TextEmbedding],
    guidance: float,
    samples: int,
    negative_first: bool = False,
) -> TextEmbedding:
    """Return the text of every row of a pass, for ``samples`` of each prompt; see ``guided``.

    Of the two branches the one with fewer tokens gets masked padding.
    """
    repeated = text.repeat_interleave(samples)
    if guidance == 1.0:
        return repeated
    null = null_text(repeated)
    length = max(repeated.mask.shape[1], null.mask.shape[1])
    parts = [_padded(part, length) for part in (repeated, null)]
    return TextEmbedding.cat(parts[::-1] if negative_first else parts)


def guided_pass(
    branch: Branch,
    latents: Tensor,
    t: Tensor,
    texts: TextEmbedding,
    guidance: float,
    negative_first: bool = False,
) -> Tensor:
    """Return the guided prediction of B samples, with the texts that ``texts_of_pass`` gives."""
    if guidance == 1.0:
        return branch(latents, t, texts)
    halves = branch(torch.cat([latents, latents]), torch.cat([t, t]), texts).chunk(2)
    unprompted, prompted = halves if negative_first else halves[::-1]
    return mixed(prompted, unprompted, guidance)


def _padded(text: TextEmbedding, length: int) -> TextEmbedding:
    missing = length - text.mask.shape[1]
    if not missing:
        return text
    return TextEmbedding(F.pad(text.embeddings, (0, 0, 0, missing)), F.pad(text.mask, (0, missing)))
