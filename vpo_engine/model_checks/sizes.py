"""Checks of the frame counts and sides that a family allows, against what VAE and pipeline can make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vpo_engine.config import Config
from vpo_engine.model_checks.table import Finding
from vpo_engine.models.registry import model_family
from vpo_engine.planning.parts import Assumed
from vpo_engine.video_model import SizeRule

_LATENT_SIDE = 2
"""Rows and columns of the latents that are decoded to count frames."""


@torch.no_grad()
def frame_rule(pipeline: Any, rule: SizeRule) -> Finding:
    """Compare the frame counts that are allowed with those that the VAE gives back."""
    from vpo_engine.model_checks.pipeline import strides_of

    stride, _ = strides_of(pipeline)
    made: dict[int, int] = {}
    wrong = []
    for frames in range(1, 2 * max(rule.frame_step, stride) + 2):
        length = (frames - 1) // stride + 1
        if length not in made:
            made[length] = _decoded_frames(pipeline, length)
        allowed = _allows(rule, frames)
        if allowed != (made[length] == frames):
            given = f"{frames} frames are {'allowed' if allowed else 'refused'}"
            wrong.append(f"{given}, and the VAE makes {made[length]} of their latents")
    return Finding(float(len(wrong)), 0.0, "; ".join(wrong[:3]))


def _decoded_frames(pipeline: Any, length: int) -> int:
    vae = pipeline.vae
    device = next(vae.parameters()).device
    latents = torch.zeros(1, pipeline.transformer.config.in_channels, length, _LATENT_SIDE, _LATENT_SIDE)
    given = [latents.to(device)]
    if vae.config.get("timestep_conditioning"):
        given.append(torch.zeros(1, device=device))
    return int(vae.decode(*given, return_dict=False)[0].shape[2])


def _allows(rule: SizeRule, frames: int) -> bool:
    try:
        rule.check_frames(frames)
    except ValueError:
        return False
    return True


def side_rule(config: Config, side: int, sampled: Callable[[tuple[int, int]], tuple[int, int]]) -> Finding:
    """Compare sides that are allowed with those that the pipeline can make; ``sampled`` says what it makes."""
    wrong = []
    for length in sorted({max(1, side // 2), side, side * 3 // 2, 2 * side}):
        size = (length, 2 * length)
        allowed, possible = _accepts(config, size), _possible(sampled, size)
        if allowed != possible:
            word, other = ("allowed", "cannot") if allowed else ("refused", "can")
            wrong.append(f"sides of {length} pixels are {word}, and the pipeline {other} make them")
    return Finding(float(len(wrong)), 0.0, "; ".join(wrong))


def _accepts(config: Config, size: tuple[int, int]) -> bool:
    settings = config.model.model_copy(update={"height": size[0], "width": size[1]})
    family = model_family(settings.kind)
    try:
        family.check(settings)
        family.blueprint(settings, Assumed().config, 1)
    except ValueError:
        return False
    return True


def _possible(sampled: Callable[[tuple[int, int]], tuple[int, int]], size: tuple[int, int]) -> bool:
    """Return whether the pipeline makes videos of a size; one that it cannot make raises, or is changed silently."""
    try:
        return sampled(size) == size
    except (ValueError, RuntimeError, IndexError):
        return False
