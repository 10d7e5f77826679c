"""Videos from strangers: changed bytes and headers that lie. They are decoded in a process of their own."""

from __future__ import annotations

import json
import math
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from fuzz_driver import EXAMPLE_SECONDS, flip, fuzz, trusted
from hypothesis import strategies as st
from video_cases import moving, write

KINDS = {
    "mp4": ("libx264", ".mp4", "yuv420p"),
    "gif": ("gif", ".gif", "rgb8"),
    "webm": ("libvpx", ".webm", "yuv420p"),
    "avi": ("mpeg4", ".avi", "yuv420p"),
    "png": ("png", ".mov", "rgb24"),
}
LARGE = [
    b"\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x00\x01\x86\xa0",
    b"\x40\x00",
    b"\x00\x00\x00\x00",
]
PLAYLISTS = [
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>file:///etc/passwd</BaseURL></MPD>',
]


_PATIENCE = EXAMPLE_SECONDS - 1
"""Seconds in which the process must have answered."""


class Decoder:
    """The process that decodes; a new one is started when the last has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def open(self, path: Path, patience: float = _PATIENCE) -> dict[str, Any]:
        """Return what the process says of a file. AssertionError where it ends, or says nothing for too long."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(str(path)) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], patience)
        line = process.stdout.readline() if ready else None
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.end()
        raise AssertionError(
            "the decoder hangs" if line is None else f"the decoder died: {process.returncode}"
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            child = str(Path(__file__).parent / "decoding_child.py")
            with trusted():
                self._process = subprocess.Popen(
                    [sys.executable, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
        return self._process

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    made.open(Path(__file__), patience=300)  # once it answers, the process has imported what it needs
    yield made
    made.end()


@cache
def written(kind: str) -> bytes:
    codec, suffix, pixels = KINDS[kind]
    with trusted():
        folder = Path(mkdtemp())
        content = write(
            folder / f"small{suffix}", moving(4, 32, 48), codec=codec, pix_fmt=pixels
        ).read_bytes()
        shutil.rmtree(folder)
    return content


def check(decoder: Decoder, path: Path) -> None:
    """Open a file, and see a video or a clear error that names it."""
    found = decoder.open(path)
    if "type" in found:
        assert found["type"] == "ValueError", found
        assert path.name in found["text"], found
        assert len(found["text"]) < 2000, found
    else:
        assert math.isfinite(found["fps"]), found
        assert found["fps"] > 0, found


@fuzz(
    kind=st.sampled_from(list(KINDS)),
    places=st.lists(st.tuples(st.integers(0, 2**14), st.integers(0, 255)), max_size=8),
    kept=st.integers(0, 600),
)
def test_changed_bytes(
    folder: Path, decoder: Decoder, kind: str, places: list[tuple[int, int]], kept: int
) -> None:
    whole = written(kind)
    path = folder / f"hostile{KINDS[kind][1]}"
    path.write_bytes(flip(whole[: kept * len(whole) // 500], places))
    check(decoder, path)


@fuzz(kind=st.sampled_from(list(KINDS)), place=st.integers(0, 2000), value=st.sampled_from(LARGE))
def test_headers_that_claim_much(folder: Path, decoder: Decoder, kind: str, place: int, value: bytes) -> None:
    whole = written(kind)
    place = place % len(whole)
    path = folder / f"hostile{KINDS[kind][1]}"
    path.write_bytes((whole[:place] + value + whole[place + len(value) :])[: len(whole)])
    check(decoder, path)


@fuzz(
    content=st.sampled_from(PLAYLISTS) | st.binary(max_size=200),
    suffix=st.sampled_from([".mp4", ".mkv", ".mpg", ".gif"]),
)
def test_files_that_are_no_videos(folder: Path, decoder: Decoder, content: bytes, suffix: str) -> None:
    path = folder / f"hostile{suffix}"
    path.write_bytes(content)
    check(decoder, path)
