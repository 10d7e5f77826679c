"""Files of lines that grow with a run, in parts of bounded size.

Lines are appended to ``NAME.jsonl``. When it has ``PART_BYTES``, it is renamed to ``NAME.0001.jsonl`` (then 0002, ...),
and a new ``NAME.jsonl`` is begun. So no file grows without bound, a run that is resumed reads and rewrites the newest
parts alone, and readers find all lines in the order of the parts.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vpo_engine.full_disk import write_by, writing
from vpo_engine.texts import why_no_file

PART_BYTES = 16 * 2**20
"""A part is closed when it has so many bytes."""
_LONGEST_LINE = 2**24
"""Bytes of the longest line that is read; no run writes a longer one."""

_logger = logging.getLogger(__name__)


class Line(NamedTuple):
    """A complete line: its file, its number in it (from 1), and its bytes with the newline."""

    file: Path
    number: int
    content: bytes


class LineFile:
    """Appends lines to a file, and closes parts of it. When ``append`` returns, the system has the lines.

    If the disk is full, nothing of the lines stays in the file, and ``append`` raises DiskFullError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)

    def append(self, lines: bytes) -> None:
        """Append whole lines."""
        before = os.fstat(self._file).st_size
        with writing(self.path):
            try:
                left = memoryview(lines)
                while left:
                    left = left[os.write(self._file, left) :]
            except BaseException:
                os.ftruncate(self._file, before)
                raise
        if before + len(lines) >= PART_BYTES:
            self._close_part()

    def cut(self, keep: Callable[[Line], bool]) -> Line | None:
        """Cut the lines off the end that ``keep`` refuses, and return the last line that is left; None for none.

        Lines are looked at from the newest part backwards, up to the first part with a line that is kept. A part is
        replaced atomically, or removed; an unfinished last line is removed.
        """
        os.close(self._file)
        try:
            return next((last for part in reversed(parts(self.path)) if (last := _cut(part, keep))), None)
        finally:
            for part in parts(self.path):
                if part != self.path and not part.stat().st_size:
                    part.unlink()
            self._file = _open(self.path)

    def sync(self) -> None:
        """Bring all lines to the disk, where they outlive a power cut."""
        with writing(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _close_part(self) -> None:
        os.fsync(self._file)
        os.close(self._file)
        newest = max(_number(part, self.path) for part in parts(self.path))
        self.path.rename(self.path.with_suffix(f".{newest + 1:04d}{self.path.suffix}"))
        self._file = _open(self.path)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def parts(path: Path) -> list[Path]:
    """Return the parts of the file ``path`` that exist, the oldest first and ``path`` itself last."""
    found = [each for each in path.parent.glob(f"{path.stem}.*{path.suffix}") if _number(each, path)]
    return sorted(found, key=lambda each: _number(each, path)) + [path] * path.exists()


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the complete lines of all parts of ``path``, in order; nothing is kept in memory.

    The last line of a part without a newline was not finished when the run stopped: it is left out, with a warning.
    """
    for part in parts(path):
        yield from _lines(part)


def _number(part: Path, path: Path) -> int:
    """Return the number of a part of ``path``; 0 for ``path`` itself and for other files."""
    match = re.fullmatch(rf"{re.escape(path.stem)}\.(\d{{4,}}){re.escape(path.suffix)}", part.name)
    return int(match[1]) if match else 0


def _lines(part: Path) -> Iterator[Line]:
    if reason := why_no_file(part):
        raise ValueError(reason)
    with part.open("rb") as file:
        for number, content in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
            if len(content) > _LONGEST_LINE:
                raise ValueError(
                    f"'{part}' line {number} has more than {_LONGEST_LINE:,} bytes; remove or repair it"
                )
            if not content.endswith(b"\n"):
                _logger.warning(
                    "'%s': the last line was not finished when the run stopped; it is left out", part
                )
                return
            yield Line(part, number, content)


def _cut(part: Path, keep: Callable[[Line], bool]) -> Line | None:
    """Cut one part, and return the last line that is left."""
    last, end = None, 0
    for line in _lines(part):
        if not keep(line):
            break
        last, end = line, end + len(line.content)
    if end < part.stat().st_size:
        write_by(part, lambda unfinished: _copy_start(part, end, unfinished))
    return last


def _copy_start(source: Path, count: int, target: Path) -> None:
    """Write the first ``count`` bytes of a file to another one, and sync it to disk."""
    with source.open("rb") as file, target.open("wb") as copy:
        copy.write(file.read(count))
        copy.flush()
        os.fsync(copy.fileno())
