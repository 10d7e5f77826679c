"""Write H.264 videos in mp4 files and read video files, with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch
from av.video.reformatter import Colorspace, Interpolation
from torch import Tensor

from vpo_engine.runs.video_file import VideoFile

SHOWN_SIDE = 256
"""Pixels of the shorter side at which a clip of a toy model can be looked at."""
_CRF = "6"
"""Constant rate factor: visually lossless by a wide margin (0 is lossless, 23 the encoder's default)."""
_BT709, _LIMITED = 1, 1
"""Numbers of ISO/IEC 23091-2 for colour primaries, transfer and matrix, and for the limited sample range."""


def shown_factor(height: int, width: int, min_side: int = SHOWN_SIDE) -> int:
    """Return the whole factor by which a clip is enlarged to be seen: 1 unless it is less than half of ``min_side``.

    Otherwise it is the smallest that brings the shorter side to ``min_side``. So clips of toy models can be looked at,
    and those of real ones, from 144p on, are written as they were made.
    """
    side = min(height, width)
    return 1 if 2 * side >= min_side else -(-min_side // side)


def write_mp4(path: Path, frames: Tensor, fps: float, *, min_side: int = SHOWN_SIDE) -> None:
    """Write uint8 frames [F, H, W, 3] as H.264 with a constant frame rate, which any browser can play.

    A clip whose shorter side is below half of ``min_side`` is enlarged (see ``shown_factor``); each pixel becomes a
    square. The format needs even sizes, so the last row or column of an odd size is repeated. Brightness keeps the
    full resolution, colour has half of it (4:2:0, BT.709, limited range).
    """
    if frames.dim() != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise ValueError(
            f"frames must be uint8 [F, H, W, 3], not empty, got {frames.dtype} {list(frames.shape)}"
        )
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    frames = _even(enlarge(frames, shown_factor(frames.shape[1], frames.shape[2], min_side)))
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _CRF, "preset": "medium"})
        stream.height, stream.width = frames.shape[1], frames.shape[2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = 1 / rate
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
        codec.color_range = _LIMITED
        for index, pixels in enumerate(frames.cpu().numpy()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.AREA
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: Path | str) -> tuple[Tensor, float]:
    """Read the frames, uint8 [F, H, W, 3], and the frames per second of a video file, as a player shows it.

    Raise ValueError for a file without readable video, and for a damaged one (see ``VideoFile.open``).
    """
    video = VideoFile.open(Path(path))
    return video[:, :][0], video.fps


def enlarge(frames: Tensor, factor: int) -> Tensor:
    """Enlarge [F, H, W, 3] to [F, factor * H, factor * W, 3]; each pixel becomes a square."""
    return frames.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _even(frames: Tensor) -> Tensor:
    if frames.shape[1] % 2:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    if frames.shape[2] % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return frames
