"""Read a file of preferred videos: one row for each pair, with the winner, the loser and their prompt.

    pairs.csv, pairs.tsv   a header with ``winner``, ``loser`` and ``prompt``, then a row for each pair
    pairs.jsonl            one object per line: {"winner": "a/0.mp4", "loser": "a/1.mp4", "prompt": "a red circle"}

Winner and loser are video files, or files of latents in safetensors with one tensor [C, T, H, W]; their names are
relative to the folder of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vpo_engine.data.clips import SUFFIXES as VIDEOS
from vpo_engine.data.prompts import PromptFile
from vpo_engine.texts import why_no_file

LATENTS = ".safetensors"
COLUMNS = ("winner", "loser", "prompt")
_TABLES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class PreferredFiles:
    """A row: the files of winner and loser, their prompt, and the row's place for errors."""

    winner: Path
    loser: Path
    prompt: str
    place: str


class PreferenceFile(Sequence[PreferredFiles]):
    """The rows of a file, each checked when the file is opened: its videos or latents are there.

    ValueError, naming file and line, for a row that cannot be read, for a file that is not there, and for one that is
    neither a video nor latents.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in _TABLES:
            raise ValueError(
                f"{path}: unknown kind of preference file {path.suffix!r}; the name must end in {', '.join(_TABLES)}"
            )
        self.path = path
        self._rows = list(self._read(path))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # a row, or a list of rows for a slice
        return self._rows[index]

    def _read(self, path: Path) -> Iterator[PreferredFiles]:
        columns = [PromptFile(path, name, choose=f"give the name {name!r}") for name in COLUMNS]
        for number, (winner, loser, prompt) in enumerate(zip(*columns, strict=True)):
            place = columns[0].place(number)
            files = self._file(path.parent / winner, place), self._file(path.parent / loser, place)
            if files[0].samefile(files[1]):
                raise ValueError(
                    f"{place}: winner and loser are the same file {winner}; give two different ones"
                )
            yield PreferredFiles(*files, prompt, place)

    def _file(self, path: Path, place: str) -> Path:
        if reason := why_no_file(path):
            reason = reason.removesuffix("; check the path")
            raise ValueError(f"{place}: {reason}; names are relative to the folder of {self.path.name}")
        if path.suffix.lower() not in (*VIDEOS, LATENTS):
            raise ValueError(
                f"{place}: {path} is neither a video nor latents; the name must end in {', '.join(VIDEOS)} or {LATENTS}"
            )
        return path


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, which is read once unless the file changes."""
    found = path.stat()
    return _hash_of(path, found.st_size, found.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowTexts:
    """A text for each row that tells it from any other by its content, for the record of a run; made when asked for."""

    def __init__(self, rows: Sequence[PreferredFiles]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> str:
        row = self._rows[index]
        return repr((content_hash(row.winner), content_hash(row.loser), row.prompt))
