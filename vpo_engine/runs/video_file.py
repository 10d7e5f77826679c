"""Read video files with PyAV, as players show them: checked at once, frame by frame when the frames are looked at."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from vpo_engine.runs.video_damage import Watch

SCALER = int(
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
"""Exact colour conversion; the default is faster, but darkens frames by one to two levels of 255."""
_RATE_TOLERANCE = 0.25
"""The share by which the rate in the header may differ from that of the frames' times, which counts otherwise: a cut
leaves gaps in the times, and AVI files can state the rate of a clock instead of that of the frames."""
_REMEDY = "give a video file that a player can play"
MOST_PIXELS = 1 << 26
"""The most pixels of a frame, 8192 x 8192: decoders allocate several frames of the size that a header claims."""
MOST_FRAMES = 100_000
MOST_IN_ALL = 1 << 36
"""The most pixels of all frames together: 18 minutes of 1080p at 30 frames per second."""
_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,h264,hevc"
"""Containers that are read. Others, such as playlists, name further files and addresses, which libav would open."""
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_pixels": str(MOST_PIXELS)}


class VideoFile:
    """A video file that stands for uint8 videos [1, F, H, W, 3], for scorers that look at some of the frames.

    ``videos[rows, frames]`` is the tensor that a tensor of all frames would give; only these frames are converted and
    kept. Frames are as players show them: turned and mirrored by the display matrix, with square pixels, in the
    colours that the file names.
    """

    ndim, dtype, device = 5, torch.uint8, torch.device("cpu")

    def __init__(self, path: Path, num_frames: int, height: int, width: int, fps: float) -> None:
        """Take what ``open`` found; ``height`` and ``width`` are those of the frames as they are shown."""
        self.path, self.fps = path, fps
        self.shape = torch.Size((1, num_frames, height, width, 3))
        self._decoder: Iterator[tuple[Any, Any]] | None = None
        self._reformatter = VideoReformatter()  # one for all frames: each keeps tables for its size
        self._next = 0

    @classmethod
    def open(cls, path: Path) -> VideoFile:
        """Decode the whole file once, keeping nothing, and return it.

        Raise ValueError, naming the file, for one that is no video, is damaged or incomplete, changes its frame size,
        is to be shown at an angle that is no quarter turn, or is larger than MOST_PIXELS, MOST_FRAMES or MOST_IN_ALL.
        """
        sizes, times = list[tuple[int, int]](), list[float]()
        with _opened(path) as (container, stream):
            watch = Watch(path, container, stream)
            for frame in watch.frames():
                sizes.append(_shown_size(frame, stream, path))
                if sizes[-1] != sizes[0]:
                    raise ValueError(
                        f"'{path}' changes its frames from {_text(sizes[0])} to {_text(sizes[-1])} at frame "
                        f"{len(times)}; write it anew with frames of one size"
                    )
                times.append(math.nan if frame.time is None else frame.time)
                _refuse_long(path, len(times), sizes[0])
            fps = _frame_rate(stream, times)
            watch.refuse_damage(times, fps)
        if not times or not fps or not math.isfinite(fps):
            raise ValueError(f"'{path}' has no frames or no frame rate; {_REMEDY}")
        return cls(path, len(times), *sizes[0], fps)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> VideoFile:
        """Make the object of which ``to_fields`` gave the values, without decoding the file."""
        _, num_frames, height, width, _ = fields["shape"]
        return cls(Path(fields["path"]), num_frames, height, width, float(fields["fps"]))

    def to_fields(self) -> dict[str, Any]:
        """Return everything that another process needs, as plain values for JSON."""
        return {"path": str(self.path.resolve()), "shape": list(self.shape), "fps": self.fps}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: tuple[slice | Tensor, Sequence[int] | Tensor | slice]) -> Tensor:
        """Return uint8 [rows, frames, H, W, 3] for a slice of rows, and [frames, H, W, 3] for a row for each frame."""
        rows, frames = key
        indices = (
            range(self.shape[1])[frames] if isinstance(frames, slice) else [int(index) for index in frames]
        )
        read = self._read(indices)
        if isinstance(rows, slice):
            return read.unsqueeze(0)[rows]
        assert len(rows) == len(indices)
        assert not bool(rows.any())
        return read

    def close(self) -> None:
        """Close the file; it is opened again when more frames are asked for."""
        self._decoder, self._next = None, 0

    def _read(self, indices: Sequence[int]) -> Tensor:
        """Return the frames uint8 [len(indices), H, W, 3]. Decoding goes on where the last call stopped, if it can."""
        frames = torch.empty(_that_fits(self.path, (len(indices), *self.shape[2:])), dtype=torch.uint8)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        for index in sorted(places):
            pixels = torch.from_numpy(self._frame(index))
            for place in places[index]:
                frames[place] = pixels
        return frames

    def _frame(self, index: int) -> np.ndarray:
        assert 0 <= index < self.shape[1], index
        if self._decoder is None or index < self._next:
            self._decoder, self._next = _decoded(self.path), 0
        for frame, stream in self._decoder:
            self._next += 1
            if self._next > index:
                pixels = _as_shown(frame, stream, self.path, self._reformatter)
                if pixels.shape == self.shape[2:]:
                    return pixels
                break
        raise ValueError(
            f"'{self.path}' was changed while it was read; start again, and leave the file as it is"
        )


def _decoded(path: Path) -> Iterator[tuple[Any, Any]]:
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            yield frame, stream


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file and choose its video stream. Raise ValueError for a file without readable video."""
    try:
        container = av.open(f"file:{path}", options=_OPTIONS, metadata_errors="replace")
    except (FileNotFoundError, PermissionError):
        raise
    except av.error.FFmpegError as error:
        raise ValueError(f"'{path}' is not a readable video file ({error.strerror}); {_REMEDY}") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError(f"'{path}' has no video stream; {_REMEDY}")
        if stream.codec_context is None:
            raise ValueError(f"'{path}' has video that cannot be decoded here; write it anew as H.264")
        _refuse_large(path, stream.codec_context.height, stream.codec_context.width)
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        yield container, stream


def _refuse_large(path: Path, height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"'{path}' has frames of {height} x {width} pixels, and frames are read up to {MOST_PIXELS} pixels; write "
            "it anew with smaller frames"
        )


def _refuse_long(path: Path, count: int, size: tuple[int, int]) -> None:
    if count > MOST_FRAMES or count * size[0] * size[1] > MOST_IN_ALL:
        raise ValueError(
            f"'{path}' has more than {count - 1} frames of {_text(size)} pixels, and videos are read up to "
            f"{MOST_FRAMES} frames and {MOST_IN_ALL} pixels in all; cut it"
        )


def _that_fits(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of frames. Raise ValueError if this machine does not have the memory for them."""
    needed, memory = math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"'{path}': {shape[0]} frames of {shape[1]} x {shape[2]} pixels take {needed} bytes, and this machine has "
            f"{memory}; cut it, or write it anew with smaller frames"
        )
    return shape


def _frame_rate(stream: Any, times: Sequence[float]) -> float | None:
    """Return the frames per second: of the header, unless the times of the frames tell of another rate."""
    stated = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    length = max(times) - min(times) if len(times) > 1 else 0.0
    if not length > 0:
        return stated[0] if stated else None
    measured = (len(times) - 1) / length
    fitting = [rate for rate in stated if abs(rate / measured - 1) <= _RATE_TOLERANCE]
    return fitting[0] if fitting else measured


def _shown_size(frame: Any, stream: Any, path: Path) -> tuple[int, int]:
    """Return height and width of a frame as it is shown."""
    height, width = frame.height, _shown_width(frame, stream)
    _refuse_large(path, height, width)
    return (width, height) if _orientation(frame, path)[0] else (height, width)


def _as_shown(frame: Any, stream: Any, path: Path, reformatter: VideoReformatter) -> np.ndarray:
    """Convert a decoded frame to uint8 [H, W, 3] as it is shown, with the colour matrix that the file names."""
    width = _shown_width(frame, stream)
    rgb = reformatter.reformat(frame, width=width, format="rgb24", interpolation=SCALER)
    pixels = rgb.to_ndarray()
    transposed, up_down, left_right = _orientation(frame, path)
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    return np.ascontiguousarray(pixels[:: -1 if up_down else 1, :: -1 if left_right else 1])


def _shown_width(frame: Any, stream: Any) -> int:
    """Return the width, before the frame is turned, that makes its pixels squares; the height stays."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return max(1, round(frame.width * aspect))


def _orientation(frame: Any, path: Path) -> tuple[bool, bool, bool]:
    """Return how a frame is to be shown: rows and columns swapped, then upside down, then left to right.

    The display matrix (a, b, u, c, d, v, x, y, w) moves the pixel at (x, y) to (a x + c y, b x + d y). Raise
    ValueError for one that is no quarter turn, mirrored or not.
    """
    found = frame.side_data.get(SideData.DISPLAYMATRIX)
    if found is None or len(bytes(found)) != 36:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found))
    if not any((a, b, c, d)):
        return False, False, False
    transposed = abs(b) > abs(a)
    big, small = ((b, c), (a, d)) if transposed else ((a, d), (b, c))
    if not all(big) or max(map(abs, small)) > 0.02 * min(map(abs, big)):
        raise ValueError(
            f"'{path}' is to be shown at an angle of {math.degrees(math.atan2(b, a)):.0f} degrees; write it anew with "
            "upright frames"
        )
    return (True, b < 0, c < 0) if transposed else (False, d < 0, a < 0)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
