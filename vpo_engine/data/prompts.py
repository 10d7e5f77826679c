"""Read prompt files of any length, and shuffle them into an endless, deterministic stream.

``PromptFile`` keeps an offset of eight bytes per prompt in memory, and reads a text when it is needed; only a JSON file
is read whole. Every row is checked when the file is opened, so a row that is not valid stops a run at its start.
``PromptStream`` shuffles without storing a permutation. Its prompts are a pure function of (seed, cursor), so a
checkpoint needs the cursor only. docs/prompts.md describes the layouts.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from vpo_engine.data.fingerprint import Fingerprint, FingerprintMaker, Prompts
from vpo_engine.data.prompt_json import begins_with_list, is_json_file, read_json
from vpo_engine.data.prompt_layouts import JsonLines, Layout, PlainLines, Table
from vpo_engine.data.prompt_lines import ColumnError, Lines
from vpo_engine.texts import why_no_file

__all__ = ["ColumnError", "PromptFile", "PromptItem", "PromptList", "PromptStream", "Prompts", "place_of"]

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json")
CHOOSE_COLUMN = "set prompts.column"
"""What the user of a training run does to name a column; the errors of ``PromptFile`` say so."""


def place_of(prompts: Prompts, index: int) -> str:
    """Return where a prompt stands, for errors: file and line, or its number in a list."""
    if isinstance(prompts, PromptFile | PromptList | PlacedPrompts):
        return prompts.place(index)
    return f"prompt {index + 1}"


class PromptList(list[str]):
    """Prompts in memory that know their places: ``given`` ones, and behind them the first ``count`` of a file."""

    def __init__(
        self, given: Iterable[str], file: PromptFile | None = None, count: int | None = None
    ) -> None:
        super().__init__(given)
        self._given, self._file = len(self), file
        if file is not None:
            self += (file[index] for index in range(len(file))[:count])

    def place(self, index: int) -> str:
        if self._file is None or index < self._given:
            return f"prompt {index + 1}"
        return self._file.place(index - self._given)


class PlacedPrompts(list[str]):
    """Prompts that stand beside videos, each with its place."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        """``rows``: prompt and place."""
        prompts, self._places = zip(*rows, strict=True)
        super().__init__(prompts)

    def place(self, index: int) -> str:
        return self._places[index]


class _OnDisk:
    """Rows that are read from the file when they are asked for."""

    def __init__(self, file: BinaryIO, layout: Layout, maker: FingerprintMaker) -> None:
        self._file, self._layout = file, layout
        offsets = array("Q")
        for start, prompt in layout.rows():
            offsets.append(start)
            maker.add(prompt)
        self._offsets = np.frombuffer(offsets, dtype=np.uint64)
        self._counted = (0, 1)  # a place in the file, and its line

    def text(self, index: int) -> str:
        start, end = int(self._offsets[index]), os.fstat(self._file.fileno()).st_size
        if index + 1 < len(self._offsets):
            end = int(self._offsets[index + 1])
        return self._layout.parse(os.pread(self._file.fileno(), end - start, start))

    def line(self, index: int) -> int:
        wanted = int(self._offsets[index])
        at, line = self._counted if self._counted[0] <= wanted else (0, 1)
        self._file.seek(at)
        while at < wanted and (chunk := self._file.read(min(wanted - at, 1 << 20))):
            at, line = at + len(chunk), line + chunk.count(b"\n")
        self._counted = at, line
        return line


class _InMemory:
    """Rows of a JSON file."""

    def __init__(self, rows: Iterable[tuple[int, str]], maker: FingerprintMaker) -> None:
        self._lines, self._texts = array("Q"), list[str]()
        for line, prompt in rows:
            self._lines.append(line)
            self._texts.append(prompt)
            maker.add(prompt)

    def text(self, index: int) -> str:
        return self._texts[index]

    def line(self, index: int) -> int:
        return self._lines[index]


class PromptFile:
    """The prompts of a file (UTF-8), stripped of blanks at both ends.

    .txt: one prompt per line; blank lines are skipped. .csv, .tsv: a header, then a prompt per row, in ``column``;
    quoted fields may contain line breaks. .jsonl: one object per line, with the prompt under the key ``column``.
    .json: a list of texts or of objects, or an object of names with either; also a list under the name .jsonl, and an
    object per line under the name .json. Without ``column``, the file must have exactly one column or key of
    ``KNOWN_NAMES``, which is used. ``choose`` begins the remedy of an error about columns.

    ValueError, naming file, line and remedy, for a file or row that cannot be read, for an empty prompt, if there is no
    prompt, and, on access, if the file has changed since it was opened; ColumnError about columns.
    """

    def __init__(self, path: str | Path, column: str | None = None, *, choose: str = CHOOSE_COLUMN) -> None:
        self.path = Path(path)
        self._file = self._open()
        self._version = self._stat()
        maker = FingerprintMaker()
        self._rows = self._read(maker, column, choose)
        self.fingerprint: Fingerprint = maker.finish()
        if not len(self):
            raise ValueError(f"{self.path}: the file has no prompts; give a file with at least one")

    def _open(self) -> BinaryIO:
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{self.path}: unknown kind of prompt file {self.path.suffix!r}; the name must end in "
                f"{', '.join(SUFFIXES)}"
            )
        if reason := why_no_file(self.path, "prompt file"):
            absent = f"{self.path}: there is no such prompt file; check the path (relative to {Path.cwd()})"
            raise ValueError(reason if os.path.exists(self.path) else absent)
        try:
            return self.path.open("rb")
        except OSError as error:
            raise ValueError(
                f"{self.path}: the file cannot be opened ({error.strerror}); change its permissions"
            ) from error

    def _read(self, maker: FingerprintMaker, column: str | None, choose: str) -> _OnDisk | _InMemory:
        suffix = self.path.suffix.lower()
        lines = Lines(self.path, self._file, whole=suffix == ".json")
        if suffix == ".jsonl" and begins_with_list(self._file):
            return _InMemory(read_json(Lines(self.path, self._file, whole=True), column, choose), maker)
        if suffix == ".json" and is_json_file(lines):
            return _InMemory(read_json(lines, column, choose), maker)
        if suffix == ".tsv":
            return self._read_tsv(lines, maker, column, choose)
        layout: Layout
        if suffix == ".txt":
            layout = PlainLines(lines, column)
        else:
            layout = Table(lines, column, choose) if suffix == ".csv" else JsonLines(lines, column, choose)
        return _OnDisk(self._file, layout, maker)

    def _read_tsv(self, lines: Lines, maker: FingerprintMaker, column: str | None, choose: str) -> _OnDisk:
        """Read tabs with quoted fields; where that fails and no field is in quotes, a quotation mark is a character."""
        try:
            Table(lines, column, choose, "\t").check()
        except ColumnError:
            raise
        except ValueError as error:
            plain = Table(lines, column, choose, "\t", quotes=False)
            try:
                plain.check()
            except ValueError:
                raise error from None
            return _OnDisk(self._file, plain, maker)
        return _OnDisk(self._file, Table(lines, column, choose, "\t"), maker)

    def _stat(self) -> tuple[int, int]:
        now = os.fstat(self._file.fileno())
        return now.st_size, now.st_mtime_ns

    @property
    def is_the_file_at_its_path(self) -> bool:
        """Return whether the path still names this file, and the file is as it was when it was opened."""
        return (
            self.path.exists()
            and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
            and self._stat() == self._version
        )

    def __len__(self) -> int:
        return self.fingerprint.count

    def __getitem__(self, index: int, /) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)} in {self.path}")
        if self._stat() != self._version:
            raise ValueError(
                f"{self.path}: the file was changed after the run had opened it; restart the run, and do not change "
                "the file while it runs"
            )
        return self._rows.text(index % len(self))

    def place(self, index: int) -> str:
        """Return the file and the line in which a prompt begins."""
        entry = f", entry {index + 1}" if isinstance(self._rows, _InMemory) else ""
        return f"{self.path}, line {self._rows.line(index)}{entry}"


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt and its position in the file, counted from 0."""

    index: int
    text: str


class Stream(Protocol):
    """An endless stream of prompts, which is a function of the position alone."""

    def __len__(self) -> int:
        """Return the number of positions, from 0 on, in which every prompt of the stream occurs."""
        ...

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """Return the prompts at ``cursor, ..., cursor + count - 1``."""
        ...


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

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        """Return the prompts at ``cursor, ..., cursor + count - 1``; the next cursor is ``cursor + count``."""
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor={cursor} and count={count} must not be negative")
        indices = map(self.index, range(cursor, cursor + count))
        return [PromptItem(index, self._prompts[index]) for index in indices]

    def index(self, position: int) -> int:
        """Return which prompt is at a position of the stream."""
        epoch, place = divmod(position, len(self._prompts))
        return self._permute(epoch, place)

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
