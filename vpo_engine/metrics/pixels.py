"""Simple pixel measures of natural videos, which need no network. They are not a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pixel_measures(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Measure videos, uint8 [B, F, H, W, 3]: {name: float32 [B]}. The prompts are not used.

    motion: mean absolute difference of neighbouring frames, grey levels 0..255.
    flicker: standard deviation over time of the second difference of the frames' mean brightness, grey levels.
    sharpness: mean absolute Laplacian of the luminance, grey levels.
    Raise ValueError for clips of fewer than three frames, whose flicker is not defined.
    """
    if videos.dim() != 5 or videos.shape[-1] != 3 or videos.dtype != torch.uint8:
        raise ValueError(f"videos must be uint8 [B, F, H, W, 3], got {videos.dtype} {list(videos.shape)}")
    if videos.shape[1] < 3:
        raise ValueError(f"pixel measures need at least 3 frames, got {videos.shape[1]}")
    if len(prompts) != len(videos):
        raise ValueError(
            f"there are {len(videos)} videos but {len(prompts)} prompts; give one prompt for each video"
        )
    rows = [_measure_one(video) for video in videos]
    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


def _measure_one(video: Tensor) -> dict[str, Tensor]:
    grey = video.float() @ torch.tensor([0.299, 0.587, 0.114], device=video.device)
    brightness = grey.mean(dim=(1, 2))
    laplacian = (
        4 * grey[:, 1:-1, 1:-1]
        - grey[:, :-2, 1:-1]
        - grey[:, 2:, 1:-1]
        - grey[:, 1:-1, :-2]
        - grey[:, 1:-1, 2:]
    )
    return {
        "motion": grey.diff(dim=0).abs().mean(),
        "flicker": brightness.diff(n=2).std(unbiased=False),
        "sharpness": laplacian.abs().mean(),
    }
