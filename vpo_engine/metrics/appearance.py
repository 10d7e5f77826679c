"""Four statistics of how clips look, and how much they have changed. A policy that exploits its reward often changes
the look of its clips."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vpo_engine.rewards.frames import spread_frames

STATISTICS = ("brightness", "contrast", "saturation", "sharpness")
_FRAMES = 8
"""Number of frames of a clip that are measured."""
_LEAST_SPREAD = 0.5
"""Least standard deviation, in levels; rounding to bytes can cause as much."""


def appearance(videos: Tensor) -> dict[str, Tensor]:
    """Measure uint8 clips [B, F, H, W, 3], H and W at least 3: means over eight frames, in levels 0..255, float32 [B].

    brightness: mean luminance. contrast: its standard deviation within a frame. saturation: mean difference of a
    pixel's largest and smallest channel. sharpness: mean absolute Laplacian of the luminance.
    """
    shown = videos[:, spread_frames(videos.shape[1], _FRAMES)]
    rows = [torch.stack([_of_frame(frame) for frame in clip]).mean(dim=0) for clip in shown]
    return dict(zip(STATISTICS, torch.stack(rows).unbind(1), strict=True))


def _of_frame(frame: Tensor) -> Tensor:
    """Measure the four statistics, float32 [4], of a frame, uint8 [H, W, 3]."""
    pixels = frame.float()
    luma = pixels @ torch.tensor([0.299, 0.587, 0.114], device=frame.device)
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    laplacian = 4 * luma[1:-1, 1:-1] - around
    saturation = (pixels.amax(dim=2) - pixels.amin(dim=2)).mean()
    return torch.stack((luma.mean(), luma.std(correction=0), saturation, laplacian.abs().mean()))


def style_distance(base: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare statistics [M], M >= 2, of the same clips by the base policy and now.

    Return the change of each mean in standard deviations of the base's clips; positive if it increased.
    """
    found = {}
    for name, before in base.items():
        spread = max(float(before.double().std()), _LEAST_SPREAD)
        found[name] = float(now[name].double().mean() - before.double().mean()) / spread
    return found
