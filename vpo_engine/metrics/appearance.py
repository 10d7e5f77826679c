"""How clips look, in four numbers, and how far that has moved: a policy that exploits its reward often shows it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vpo_engine.rewards.frames import spread_frames

STATISTICS = ("brightness", "contrast", "saturation", "sharpness")
_FRAMES = 8
"""Of a clip that are looked at."""
_LEAST_SPREAD = 0.5
"""Levels: what rounding to bytes can do."""


def appearance(videos: Tensor) -> dict[str, Tensor]:
    """Of uint8 clips [B, F, H, W, 3], H and W at least 3, means over eight frames; levels 0..255, float32 [B].

    brightness: mean luminance. contrast: its standard deviation within a frame. saturation: mean difference of a
    pixel's largest and smallest channel. sharpness: mean absolute Laplacian of the luminance.
    """
    shown = videos[:, spread_frames(videos.shape[1], _FRAMES)]
    rows = [torch.stack([_of_frame(frame) for frame in clip]).mean(dim=0) for clip in shown]
    return dict(zip(STATISTICS, torch.stack(rows).unbind(1), strict=True))


def _of_frame(frame: Tensor) -> Tensor:
    """uint8 [H, W, 3] to the four statistics, float32 [4]."""
    pixels = frame.float()
    luma = pixels @ torch.tensor([0.299, 0.587, 0.114], device=frame.device)
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    laplacian = 4 * luma[1:-1, 1:-1] - around
    saturation = (pixels.amax(dim=2) - pixels.amin(dim=2)).mean()
    return torch.stack((luma.mean(), luma.std(correction=0), saturation, laplacian.abs().mean()))


def style_distance(base: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """Of statistics [M], M >= 2, of the same clips before and now: the change of the mean, in standard deviations of
    the base's clips. The sign says whether it grew."""
    found = {}
    for name, before in base.items():
        spread = max(float(before.double().std()), _LEAST_SPREAD)
        found[name] = float(now[name].double().mean() - before.double().mean()) / spread
    return found
