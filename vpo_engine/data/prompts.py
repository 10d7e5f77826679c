"""Read prompt files of any length, and shuffle them into an endless, deterministic stream.

``PromptFile`` keeps an offset of eight bytes per prompt in memory, and reads a text when it is needed. Every row is
checked when the file is opened, so a row that is not valid stops a run at its start. ``PromptStream`` shuffles without
storing a permutation. Its prompts are a pure function of (seed, cursor), so a checkpoint needs the cursor only.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

KNOWN_NAMES = ("name", "caption", "prompt", "text")
"""Names of the prompt's column, tried when no column is given; ``name`` is WebVid's."""

_BOM = b"\xef\xbb\xbf"
_Parser = Callable[[bytes], str]


class Prompts(Protocol):
    """A list of prompts, or an object that can be indexed like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


class _Lines:
    """Iterates over the decoded lines of a UTF-8 file, and knows the number and the place of the current line."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.number = 0  # number of the current line, from 1
        self.start = self.end = 0  # byte offsets of the current line
        self._file = file

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        if self._file.read(len(_BOM)) == _BOM:
            self.end = len(_BOM)
        self._file.seek(self.end)
        for raw in self._file:
            self.start = self.end
            self.end += len(raw)
            self.number += 1
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise self.bad_row(
                    f"byte {error.start + 1} of the line, 0x{raw[error.start]:02x}, is not UTF-8",
                    "save the file as UTF-8 (iconv -f latin1 -t utf-8 does it for Western European text)",
                ) from error
            yield text

    def bad_row(self, what: str, remedy: str, line: int | None = None) -> ValueError:
        return ValueError(f"{self.path}, line {line or self.number}: {what}; {remedy}")


def _pick_column(path: Path, what: str, names: list[str], column: str | None, choose: str) -> int:
    """Return the position of the prompt's column in ``names``."""
    wanted = KNOWN_NAMES if column is None else (column,)
    found = [i for i, name in enumerate(names) if (name if column else name.strip().casefold()) in wanted]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(repr(name) for name in names)
    if column is not None:
        problem = f"{what} {column!r} occurs {len(found)} times, but must occur once"
    else:
        problem = f"{len(found)} {what}s are named {', '.join(KNOWN_NAMES)}, but exactly one must be"
    raise ValueError(f"{path}: {problem}; {choose} to one of its {what}s: {listed or 'it has none'}")


def _scan_txt(lines: _Lines, column: str | None, choose: str) -> tuple[array[int], _Parser]:
    if column is not None:
        raise ValueError(
            f"{lines.path}: column={column!r} cannot be used, a .txt file has no columns; leave it out"
        )
    offsets = array("Q")
    for text in lines:
        if text.strip():
            offsets.append(lines.start)
    return offsets, lambda raw: raw.split(b"\n", 1)[0].decode().strip()


def _csv_rows(lines: _Lines) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (byte offset, number of the first line, fields) of each row that is not blank."""
    rows = csv.reader(iter(lines), strict=True)
    while True:
        start, line = lines.end, lines.number + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise lines.bad_row(
                f"the row that begins here is not CSV ({error})",
                'put quotes around a field with quotes, commas or line breaks, and write " inside it as ""',
                line,
            ) from error
        if row is None:
            return
        if row:
            yield start, line, row


def _scan_csv(lines: _Lines, column: str | None, choose: str) -> tuple[array[int], _Parser]:
    rows = _csv_rows(lines)
    header = next(rows, (0, 0, []))[2]
    position = _pick_column(lines.path, "column", header, column, choose)
    offsets = array("Q")
    for start, line, row in rows:
        if len(row) != len(header):
            raise lines.bad_row(
                f"the row has {len(row)} fields, but the header has {len(header)}",
                "put quotes around fields that contain commas, and complete rows that lack fields",
                line,
            )
        if not row[position].strip():
            raise lines.bad_row(
                f"the prompt ({header[position]!r}) is empty", "delete the row or fill it in", line
            )
        offsets.append(start)
    return offsets, lambda raw: next(csv.reader([raw.decode()], strict=True))[position].strip()


def _scan_jsonl(lines: _Lines, column: str | None, choose: str) -> tuple[array[int], _Parser]:
    offsets = array("Q")
    key = column
    for text in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise lines.bad_row(f"not JSON ({error})", "write one JSON object per line") from error
        if not isinstance(row, dict):
            raise lines.bad_row(
                f"JSON {type(row).__name__}, but must be an object", "write one object per line"
            )
        if not offsets:
            names = list(row)
            key = names[_pick_column(lines.path, "key", names, column, choose)]
        prompt = row.get(key)
        if not isinstance(prompt, str) or not prompt.strip():
            found = "missing" if key not in row else "empty" if isinstance(prompt, str) else repr(prompt)
            raise lines.bad_row(
                f"the prompt ({key!r}) is {found}, but must be a string with text",
                "delete the row or fill it in",
            )
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise lines.bad_row(
                f"the prompt ({key!r}) has half of a \\u surrogate pair, which is not a character",
                "write the character itself, in UTF-8",
            )
        offsets.append(lines.start)
    return offsets, lambda raw: json.loads(raw)[key].strip()


_SCANNERS = {".txt": _scan_txt, ".csv": _scan_csv, ".jsonl": _scan_jsonl}


class PromptFile:
    """The prompts of a ``.txt``, ``.csv`` or ``.jsonl`` file (UTF-8), stripped of blanks at both ends.

    .txt: one prompt per line; blank lines are skipped. .csv: a header, then a prompt per row, in ``column``; quoted
    fields may contain line breaks. .jsonl: one object per line, with the prompt under the key ``column``.
    Without ``column``, the file must have exactly one column or key of ``KNOWN_NAMES``, which is used.
    ``choose`` begins the remedy of an error about columns.

    ValueError, naming file, line and remedy, for a file or row that cannot be read, for an empty prompt in a .csv or
    .jsonl row, if there is no prompt, and, on access, if the file has changed since it was opened.
    """

    def __init__(
        self, path: str | Path, column: str | None = None, *, choose: str = "set prompts.column"
    ) -> None:
        self.path = Path(path)
        scan = _SCANNERS.get(self.path.suffix.lower())
        if scan is None:
            raise ValueError(
                f"{self.path}: unknown kind of prompt file {self.path.suffix!r}; the name must end in "
                f"{', '.join(_SCANNERS)}"
            )
        if not self.path.is_file():
            raise ValueError(
                f"{self.path}: there is no such prompt file; check the path (relative to {Path.cwd()})"
            )
        self._file = self.path.open("rb")
        self._version = self._stat()
        offsets, self._parse = scan(_Lines(self.path, self._file), column, choose)
        if not offsets:
            raise ValueError(f"{self.path}: the file has no prompts; give a file with at least one")
        self._offsets = np.frombuffer(offsets, dtype=np.uint64)

    def _stat(self) -> tuple[int, int]:
        now = os.fstat(self._file.fileno())
        return now.st_size, now.st_mtime_ns

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)} in {self.path}")
        if self._stat() != self._version:
            raise ValueError(
                f"{self.path}: the file was changed after the run had opened it; restart the run, and do not change "
                "the file while it runs"
            )
        index %= len(self)
        start = int(self._offsets[index])
        end = int(self._offsets[index + 1]) if index + 1 < len(self) else self._version[0]
        return self._parse(os.pread(self._file.fileno(), end - start, start))


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt and its position in the file, counted from 0."""

    index: int
    text: str


class PromptStream:
    """An endless stream of prompts. Each epoch has every prompt once, in another order than the other epochs.

    The order is a keyed Feistel permutation (Luby and Rackoff 1988) of the next power of four, applied again until the
    result is a prompt's index (cycle walking, Black and Rogaway 2002). It needs no memory, and about 30 microseconds
    per prompt.
    """

    _ROUNDS = 6
    _MIN_HALF_BITS = 3  # smaller Feistel networks reach too few permutations

    def __init__(self, prompts: Prompts, seed: int) -> None:
        if len(prompts) == 0:
            raise ValueError("prompts is empty; a stream needs at least one prompt")
        self._prompts = prompts
        self._seed = seed
        self._half_bits = max(self._MIN_HALF_BITS, ((len(prompts) - 1).bit_length() + 1) // 2)

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """Return the prompts at ``cursor, ..., cursor + count - 1``; the next cursor is ``cursor + count``."""
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor={cursor} and count={count} must not be negative")
        items = []
        for position in range(cursor, cursor + count):
            epoch, place = divmod(position, len(self._prompts))
            index = self._permute(epoch, place)
            items.append(PromptItem(index, self._prompts[index]))
        return items

    def _permute(self, epoch: int, place: int) -> int:
        key = hashlib.blake2b(repr((self._seed, epoch)).encode(), digest_size=16).digest()
        while True:
            place = self._feistel(key, place)
            if place < len(self._prompts):
                return place

    def _feistel(self, key: bytes, value: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for turn in range(self._ROUNDS):
            message = turn.to_bytes(1, "little") + right.to_bytes(8, "little")
            digest = hashlib.blake2b(message, digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return left << self._half_bits | right
