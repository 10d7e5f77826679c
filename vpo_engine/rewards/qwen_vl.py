"""Inputs of the scorers made of Qwen2-VL and Qwen2.5-VL: frames, sizes, patches, chat text.

The rules are those of qwen-vl-utils and of Qwen's image processor (transformers 4.45), without torchvision.

Letters: f frames that are seen, t = ceil(f / 2) temporal patches, N patches of a clip, L tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, MERGE, TEMPORAL = 14, 2, 2
CELL = PATCH * MERGE
"""The side, in pixels, of the square that becomes one token."""

VIDEO_MIN_PIXELS = 128 * CELL * CELL
MIN_FRAMES, MAX_FRAMES, MAX_RATIO = 4, 768, 200
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

VIDEO, IMAGE = "<|video_pad|>", "<|image_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

Grid = tuple[int, int, int]
"""The numbers of patches along time, height and width."""


def check_rope(config: Any, where: Path, remedy: str) -> None:
    """Raise ValueError for rotary embeddings that a configuration of Qwen, of the file ``where``, cannot have."""
    text = config.text_config
    rope = text.rope_parameters
    if not isinstance(rope, Mapping):
        rope = {}
    sections, theta = rope.get("mrope_section"), rope.get("rope_theta")
    half = text.hidden_size // text.num_attention_heads // 2
    whole = isinstance(sections, list) and all(type(each) is int and each >= 1 for each in sections)
    if not whole or len(sections) != 3 or sum(sections) != half:
        raise ValueError(
            f"{where} sets mrope_section to {json.dumps(sections)[:100]}, expected three whole numbers of at least 1 "
            f"that add up to {half}, half the channels of a head; {remedy}"
        )
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(
            f"{where} sets rope_theta to {json.dumps(theta)[:100]}, expected a number above 0; {remedy}"
        )


def frame_indices(num_frames: int, video_fps: float, fps: float) -> list[int]:
    """Return which frames of a clip at ``video_fps`` stand for it at ``fps``: an even number, with first and last.

    At least 4 and at most 768, as far as there are any. Raise ValueError for a single frame.
    """
    if num_frames < TEMPORAL:
        raise ValueError(
            f"videos have {num_frames} frame, expected at least {TEMPORAL}: motion is judged too"
        )
    most = min(MAX_FRAMES, num_frames) // TEMPORAL * TEMPORAL
    wanted = min(max(num_frames / video_fps * fps, MIN_FRAMES), most)
    count = min(round(wanted / TEMPORAL) * TEMPORAL, num_frames)
    return [int(index) for index in torch.linspace(0, num_frames - 1, count).round()]


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) in multiples of 28 that keeps the aspect ratio and has min_pixels to max_pixels pixels.

    Raise ValueError for an aspect ratio over 200.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"frames are {height} x {width}, expected an aspect ratio of at most {MAX_RATIO}")
    rows, columns = max(round(height / CELL), 1), max(round(width / CELL), 1)
    if rows * columns * CELL**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / shrink / CELL), math.floor(width / shrink / CELL)
    elif rows * columns * CELL**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / CELL), math.ceil(width * grow / CELL)
    if rows < 1 or columns < 1:
        raise ValueError(f"frames are {height} x {width}, too narrow for {max_pixels} pixels; crop them")
    return rows * CELL, columns * CELL


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize float [f, 3, H, W] in 0..1 to [f, 3, h, w], bicubic with antialiasing, cut to 0..1, differentiably."""
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)


def resize_levels(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [f, H, W, 3] to uint8 [f, 3, h, w], as torchvision resizes bytes: in float32, cut, rounded."""
    levels = F.interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
    return levels.clamp(0, 255).round().to(torch.uint8)


def patchify(pixels: Tensor) -> tuple[Tensor, Grid]:
    """Cut floats [f, 3, h, w] in 0..1, h and w multiples of 28, into normalised patches [N, 1176] and their grid.

    Rows go by time, then by blocks of 2 x 2 patches, then within the block; columns by channel, the two frames of
    a temporal patch, height, width. An odd number of frames has the last one repeated.
    """
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (pixels - mean) / std
    if len(pixels) % TEMPORAL:
        pixels = torch.cat([pixels, pixels[-1:]])
    t, rows, columns = len(pixels) // TEMPORAL, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    blocks = pixels.reshape(t, TEMPORAL, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * rows * columns, -1)
    return patches, (t, rows, columns)


def slots(token: str, grid: Grid) -> str:
    """Return a clip's (or image's) place in the text: its token once for each 2 x 2 block of patches, between marks."""
    return VISION_START + token * (math.prod(grid) // MERGE**2) + VISION_END


def chat(content: str) -> str:
    """Return a user's message in Qwen's chat template, up to where the answer begins."""
    turns = (("system", "You are a helpful assistant."), ("user", content))
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns) + (
        f"{TURN_START}assistant\n"
    )
