"""Random videos and images for scorers, and their scores in one table."""

import torch
from torch import Tensor


def noise(*shape: int) -> Tensor:
    """uint8 levels of this shape, the same at every call."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def pixels(videos: Tensor) -> Tensor:
    """uint8 videos [..., H, W, 3] to floats [..., 3, H, W] in 0..1."""
    return videos.movedim(-1, -3).float() / 255


def stacked(scores: dict[str, Tensor]) -> Tensor:
    """{dimension: [B]} to [B, D]."""
    return torch.stack(list(scores.values()), dim=1)
