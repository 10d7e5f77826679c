"""Turn frames into the inputs of VBench's networks, as its transforms do; torchvision need not be installed.

Letters: F frames of H x W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vpo_engine.rewards.clip import Convention, ImagePreprocessor
from vpo_engine.rewards.imagenet import MEAN, STD

SIDE = 224
LARGEST = 512
"""The pixels to which imaging quality shrinks a side."""
Mode = Literal["longer", "shorter", "shorter_centercrop", "None"]
_CLIP = Convention("crop", antialias=False)


def dino_pixels(frames: Tensor, side: int = SIDE) -> Tensor:
    """Return normalised pixels, float32 [F, 3, h, w], of frames, uint8 [F, H, W, 3].

    The shorter side becomes ``side``, bilinear without antialiasing, and nothing is cut off.
    """
    images = _images(frames)
    height, width = images.shape[2:]
    long = int(side * max(height, width) / min(height, width))
    images = _resized(images, (side, long) if height <= width else (long, side)) / 255
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def clip_pixels(frames: Tensor, side: int = SIDE) -> Tensor:
    """Return normalised pixels, float32 [F, 3, side, side], of frames, uint8 [F, H, W, 3].

    The shorter side becomes ``side``, bicubic without antialiasing; the middle is kept, and nothing is clamped.
    """
    return ImagePreprocessor(side, _CLIP).pixels(_images(frames) / 255)


def imaging_pixels(frames: Tensor, mode: Mode = "longer") -> Tensor:
    """Return pixels in 0..1, float32 [F, 3, h, w], of frames, uint8 [F, H, W, 3].

    Large frames are made smaller, bilinear without antialiasing, until the side that ``mode`` names has 512 pixels;
    VBench's default is the longer one.
    """
    images = _images(frames)
    height, width = images.shape[2:]
    side = max(height, width) if mode == "longer" else min(height, width)
    if mode == "None" or side <= LARGEST:
        return images / 255
    scale = LARGEST / side
    images = _resized(images, (int(scale * height), int(scale * width)))
    if mode == "shorter_centercrop":
        top, left = (round((length - LARGEST) / 2) for length in images.shape[2:])
        images = images[:, :, top : top + LARGEST, left : left + LARGEST]
    return images / 255


def _images(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2).float()


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False)
