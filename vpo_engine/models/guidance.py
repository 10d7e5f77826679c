"""Classifier-free guidance: a prediction with the prompt, one without, and their combination."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
) -> Tensor:
    """Return the guided prediction of B samples, both branches in one pass of 2 B; guidance 1 is the prompted branch.

    latents [B, C, T, H, W] at times t [B]; text of P prompts, each that of B / P samples next to each other.
    """
    text = text.repeat_interleave(len(latents) // len(text))
    if guidance == 1.0:
        return branch(latents, t, text)
    both = TextEmbedding.cat([text, null_text(text)])
    prompted, unprompted = branch(torch.cat([latents, latents]), torch.cat([t, t]), both).chunk(2)
    return mixed(prompted, unprompted, guidance)
