"""Clips in TensorBoard, as animated images: its own video writer needs moviepy."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_GAP = 4
_COLOURS = 256
LARGEST_SIDE = 480
"""Larger clips are made smaller: GIF compresses badly."""


def side_by_side(before: Tensor, after: Tensor) -> Tensor:
    """Return one clip of two, uint8 [F, H, W, 3] each, with a white gap between them."""
    gap = before.new_full((*before.shape[:2], _GAP, 3), 255)
    return torch.cat([before, gap, after], dim=2)


class Animation(NamedTuple):
    """A clip as a GIF file of ``width`` x ``height`` pixels."""

    content: bytes
    width: int
    height: int


def animation(clip: Tensor, fps: float) -> Animation:
    """Return a clip, uint8 [F, H, W, 3], as an image that moves."""
    frames = [Image.fromarray(frame.numpy()) for frame in clip]
    scale = min(1.0, LARGEST_SIDE / max(frames[0].size))
    width, height = (max(1, round(side * scale)) for side in frames[0].size)
    if scale < 1:
        frames = [frame.resize((width, height)) for frame in frames]
    frames = [_with_palette(frame) for frame in frames]
    content = io.BytesIO()
    frames[0].save(
        content, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0
    )
    return Animation(content.getvalue(), width, height)


def _with_palette(frame: Image.Image) -> Image.Image:
    """Return a frame with 256 colours: its own if they are no more, else by Pillow's fast choice of them.

    Its choice for few colours would take twenty times as long for many.
    """
    few = frame.getcolors(_COLOURS) is not None
    return frame.quantize(_COLOURS, Image.Quantize.MEDIANCUT if few else Image.Quantize.FASTOCTREE)


def add_animation(board: SummaryWriter, name: str, clip: Animation, step: int) -> None:
    """Write a clip under ``name``."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(
        height=clip.height, width=clip.width, colorspace=3, encoded_image_string=clip.content
    )
    assert board.file_writer is not None
    board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
