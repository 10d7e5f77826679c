"""Frame sheets: a clip as one still image with all frames side by side, which a page can play with a script.

Images need no video decoder, keep every pixel of a small clip, and let a page show any number of clips at
exactly the same frame.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

_FIRST_PIXELS = 800_000
"""A clip that is too large for its budget is first reduced to this number of pixels, all frames together."""


@dataclass(frozen=True)
class FrameSheet:
    """A clip as one image: frame i is at column ``i % columns``, row ``i // columns``."""

    url: str
    """``data:`` URL of a PNG, which keeps every pixel, or of a WebP."""
    frames: int
    columns: int
    width: int
    """Pixels of one frame."""
    height: int
    exact: bool
    """True if no pixel was changed."""


def make_frame_sheet(video: Tensor, budget: int) -> FrameSheet:
    """Make an image of at most ``budget`` bytes of a clip, uint8 [F, H, W, 3]; reduce the frames if necessary.

    Raise AssertionError if even frames of a few pixels do not fit; a budget must be at least some kilobytes.
    """
    height, width = video.shape[1], video.shape[2]
    data = _encode(video, "PNG") if video.numel() <= 8 * budget else b""
    if 0 < len(data) <= budget:
        return _frame_sheet(data, "png", video, exact=True)
    scale = min(1.0, math.sqrt(_FIRST_PIXELS / (video.shape[0] * height * width)))
    while scale * min(height, width) >= 4:
        smaller = _resized(video, round(scale * height), round(scale * width))
        data = _encode(smaller, "WEBP", quality=85, method=4)
        if len(data) <= budget:
            return _frame_sheet(data, "webp", smaller, exact=False)
        scale *= 0.8
    raise AssertionError(f"a clip {list(video.shape)} cannot be shown in {budget} bytes")


def _columns(frames: int, height: int, width: int) -> int:
    """Return the number of columns that makes the image about square; formats and browsers limit both sides."""
    return max(1, min(frames, round(math.sqrt(frames * height / width))))


def _encode(video: Tensor, image_format: str, **options: bool | int) -> bytes:
    frames, height, width, _ = video.shape
    columns = _columns(frames, height, width)
    rows = -(-frames // columns)
    cells = torch.zeros(rows * columns, height, width, 3, dtype=torch.uint8)
    cells[:frames] = video
    sheet = cells.view(rows, columns, height, width, 3).transpose(1, 2)
    pixels = sheet.reshape(rows * height, columns * width, 3).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def _resized(video: Tensor, height: int, width: int) -> Tensor:
    if video.shape[1:3] == (height, width):
        return video
    frames = [Image.fromarray(f.numpy()).resize((width, height), Image.Resampling.BOX) for f in video]
    return torch.stack([torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8) for f in frames]).view(
        -1, height, width, 3
    )


def _frame_sheet(data: bytes, kind: str, video: Tensor, exact: bool) -> FrameSheet:
    frames, height, width, _ = video.shape
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return FrameSheet(url, frames, _columns(frames, height, width), width, height, exact)
