"""Turn frames into the inputs of video networks trained with ImageNet's means: resized, cropped to a square."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def square_clips(
    frames: Tensor,
    side: int,
    mode: Literal["bicubic", "bilinear"],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turn float frames [B, T, 3, H, W] in 0..1 into normalised float32 frames [B, T, 3, side, side], with gradients.

    The aspect ratio is kept; resizing is antialiased and clamps nothing. The length of the longer side is rounded;
    torchvision's Resize cuts it off. The middle of the longer side is kept, or a
    place that ``generator`` (on the CPU) draws once for all frames.
    """
    height, width = frames.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    images = frames.flatten(0, 1).float()
    if size != (height, width):
        images = F.interpolate(images, size, mode=mode, align_corners=False, antialias=True)
    free = [length - side for length in size]
    if generator is None:
        top, left = (length // 2 for length in free)
    else:
        top, left = (int(torch.randint(length + 1, (), generator=generator)) for length in free)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (images[..., top : top + side, left : left + side] - mean) / std
    return images.unflatten(0, frames.shape[:2])
