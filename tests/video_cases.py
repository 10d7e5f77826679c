"""Video files for tests, written with PyAV: of any container and codec, marked to be shown in some way, damaged."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

CASES = Path(__file__).parent / "data" / "cases"
"""Small files of users' bug reports, and files that are odd but valid."""


def moving(frames: int, height: int = 48, width: int = 64) -> Tensor:
    """A clip, uint8 [F, H, W, 3], no frame and no corner of which is like another; smooth, so that codecs keep it."""
    f, y, x = (torch.arange(count) for count in (frames, height, width))
    red = 30 + 200 * x / width + 0 * y.view(-1, 1) + 0 * f.view(-1, 1, 1)
    green = 30 + 200 * y.view(-1, 1) / height + 0 * x + 0 * f.view(-1, 1, 1)
    blue = 120 + 100 * torch.sin(x / 9 + y.view(-1, 1) / 7 + f.view(-1, 1, 1) / 2)
    return torch.stack([red, green, blue], dim=3).round().to(torch.uint8)


def write(
    path: Path,
    clip: Tensor,
    *,
    codec: str = "libx264",
    rate: int = 10,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    **reformat: Any,
) -> Path:
    """Encode a clip; ``prepare`` may mark the stream before. ``reformat`` goes to the conversion of colours."""
    with av.open(
        str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}
    ) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        prepare(stream)
        for index, pixels in enumerate(clip.numpy()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt, **reformat)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def nine_tenths(content: bytes) -> bytes:
    return content[: len(content) * 9 // 10]


def zeros_at_the_end(content: bytes) -> bytes:
    """As a download leaves it that reserved its place on the disk and broke off."""
    return half(content) + bytes(len(content) - len(content) // 2)


def changed_in_the_middle(content: bytes) -> bytes:
    """A quarter of the file. Of a few bytes, decoders can make a picture without noticing."""
    damaged, start, size = bytearray(content), len(content) // 2, len(content) // 4
    generator = torch.Generator().manual_seed(0)
    damaged[start : start + size] = bytes(torch.randint(256, (size,), generator=generator).tolist())
    return bytes(damaged)
