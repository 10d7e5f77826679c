"""Notice that a video file is damaged or incomplete, which decoders pass over without an error."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.logging

_HARMLESS = (
    "mmco:",
    "co located POCs",
    "number of reference frames",
    "SEI type",
    "illegal short term buffer",
)
"""How messages begin that H.264 decoders also write about files that play properly."""
_SEGMENT, _EBML = b"\x18\x53\x80\x67", b"\x1a\x45\xdf\xa3"
_RIFF_SLACK = 16
"""Bytes by which the size in an AVI file may be too large: some programs count its own header."""
_SHORTER = 0.02
"""Share of the declared duration that may be missing at the end, beside the longest frame."""


class Watch:
    """The decoding of one file from beginning to end, with all signs of damage that show on the way."""

    def __init__(self, path: Path, container: Any, stream: Any) -> None:
        self._path, self._container, self._stream = path, container, stream
        self._signs: list[str] = []

    def frames(self) -> Iterator[Any]:
        """Yield the decoded frames; a decoder that gives up ends them."""
        names = {self._container.format.name, self._stream.codec_context.name}
        with _error_messages() as messages:
            try:
                for packet in self._container.demux(self._stream):
                    self._note("a part of the stream is marked as damaged", packet.is_corrupt)
                    for frame in packet.decode():
                        self._note("a frame is marked as damaged", frame.is_corrupt)
                        yield frame
            except av.error.FFmpegError as error:
                self._note(f"decoding stopped ({error.strerror})")
            for _, name, text in messages:
                if name in names and not text.startswith(_HARMLESS):
                    self._note(f"{name} says: {' '.join(text.split())}")

    def refuse_damage(self, times: Sequence[float], fps: float | None) -> None:
        """Raise ValueError, naming the file, for the first sign of damage. ``times`` are those of the frames."""
        declared, actual = declared_bytes(self._path), self._path.stat().st_size
        if declared is not None and actual < declared:
            self._signs.insert(0, f"it should have {declared:,} bytes, but has {actual:,}")
        if self._container.format.name == "gif":
            self._note("its end is missing", not self._path.read_bytes().rstrip(b"\0\r\n").endswith(b";"))
        self._note("it ends before its declared end", self._ends_early(times))
        if not self._signs:
            return
        remedy = "copy or download the file again, or take it out of the folder"
        if not times:
            raise ValueError(f"'{self._path}' has no frames that can be read: {self._signs[0]}; {remedy}")
        raise ValueError(
            f"'{self._path}' is damaged or incomplete: {self._signs[0]}; {len(times)}{self._of_declared(fps)} can be "
            f"read; {remedy}"
        )

    def _note(self, sign: str, seen: bool = True) -> None:
        if seen and sign not in self._signs:
            self._signs.append(sign)

    def _ends_early(self, times: Sequence[float]) -> bool:
        """Return whether frames are missing before the end of the stream, as far as the header declares one.

        The last frame may be shown for as long as the longest other one.
        """
        stream = self._stream
        if not stream.duration or len(times) < 2 or any(map(math.isnan, times)):
            return False
        ordered = sorted(times)
        longest = max(after - before for before, after in pairwise(ordered))
        seconds = float(stream.duration * stream.time_base)
        begin = float((stream.start_time or 0) * stream.time_base)
        return begin + seconds - ordered[-1] > 1.5 * longest + _SHORTER * seconds

    def _of_declared(self, fps: float | None) -> str:
        """Return " of N declared frames", or " frames" where the file does not say how long its video is."""
        stream = self._stream
        seconds = _seconds_of_tag(stream.metadata.get("DURATION", ""))
        if stream.frames and stream.average_rate:
            seconds = float(stream.frames / stream.average_rate)
        elif stream.duration:
            seconds = float(stream.duration * stream.time_base)
        elif seconds is None and self._container.duration and len(self._container.streams) == 1:
            seconds = self._container.duration / av.time_base
        return " frames" if seconds is None or fps is None else f" of {round(seconds * fps)} declared frames"


def _seconds_of_tag(text: str) -> float | None:
    """Return the seconds of Matroska's tag of a stream's duration, such as 00:00:04.000000000."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9}):(\d{1,9}\.?\d*)", text)
    return None if found is None else 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3])


def declared_bytes(path: Path) -> int | None:
    """Return how many bytes a file must have by its outermost structure (mp4, mov, webm, mkv, avi), or else None."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            size = int.from_bytes(head[4:8], "little")
            return None if size in (0, 2**32 - 1) else 8 + size - _RIFF_SLACK
        if head[:4] == _EBML:
            return _end_of_segment(file)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
            return _end_of_boxes(file, path.stat().st_size)
    return None


def _end_of_boxes(file: BinaryIO, actual: int) -> int | None:
    """Return where the last box of an ISO base media file ends; None where it reaches to the end or is no box."""
    place = 0
    while place < actual:
        file.seek(place)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1 and len(head) == 16:
            size = int.from_bytes(head[8:], "big")
        if size < 8 or not head[4:8].isascii():
            return None
        place += size
    return place


def _end_of_segment(file: BinaryIO) -> int | None:
    """Return where the segment of a Matroska file ends; None if its size is unknown, as in a live recording."""
    file.seek(len(_EBML))
    header = _variable_integer(file)
    if header is None:
        return None
    file.seek(header, 1)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return None
    size = _variable_integer(file)
    return None if size is None else file.tell() + size


def _variable_integer(file: BinaryIO) -> int | None:
    """Read the size of an EBML element; None if it is unknown (all bits set) or is no size."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(first + file.read(length - 1), "big") & mask
    return None if value == mask else value


@contextmanager
def _error_messages() -> Iterator[list[tuple[int, str, str]]]:
    """Collect what libav's parts say of errors, which otherwise is not shown: (level, name of the part, text)."""
    level, repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False) as messages:
            yield messages
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(repeated)
