"""Classifier-free guidance: a prediction with the prompt, one without, and their combination."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.model_values import SplitGuidance, TextEmbedding

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
    split: SplitGuidance | None = None,
) -> TextEmbedding:
    """Return the text of every row of a pass, for ``samples`` of each prompt; see ``guided``.

    Of the two branches the one with fewer tokens gets masked padding. split: return the text of this process's half.
    """
    repeated = text.repeat_interleave(samples)
    if guidance == 1.0:
        return repeated
    null = null_text(repeated)
    length = max(repeated.mask.shape[1], null.mask.shape[1])
    parts = [_padded(part, length) for part in (repeated, null)]
    if negative_first:
        parts.reverse()
    return TextEmbedding.cat(parts) if split is None else parts[split.half]


def guided_pass(
    branch: Branch,
    latents: Tensor,
    t: Tensor,
    texts: TextEmbedding,
    guidance: float,
    negative_first: bool = False,
    split: SplitGuidance | None = None,
) -> Tensor:
    """Return the guided prediction of B samples, with the texts that ``texts_of_pass`` gives.

    split: this process computes one branch, and gets the other one from the process that shares the samples.
    """
    if guidance == 1.0:
        return branch(latents, t, texts)
    if split is None:
        whole = branch(torch.cat([latents, latents]), torch.cat([t, t]), texts)
    else:
        whole = split.exchange(branch(latents, t, texts))
    unprompted, prompted = whole.chunk(2) if negative_first else whole.chunk(2)[::-1]
    return mixed(prompted, unprompted, guidance)


def _padded(text: TextEmbedding, length: int) -> TextEmbedding:
    missing = length - text.mask.shape[1]
    if not missing:
        return text
    return TextEmbedding(F.pad(text.embeddings, (0, 0, 0, missing)), F.pad(text.mask, (0, missing)))
