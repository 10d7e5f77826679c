"""The lines of a prompt file, and the checks of text that all layouts of prompt files share."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vpo_engine.texts import Decoder, shortened, unique_keys

KNOWN_NAMES = ("name", "caption", "prompt", "text", "prompt_en", "video_prompt")
"""Names of the prompt's column, tried when no column is given; ``name`` is WebVid's, ``prompt_en`` VBench's."""

_UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_TO_UTF8 = "save it as UTF-8 (iconv -f utf-16 -t utf-8 FILE > NEW does it for UTF-16)"


_LONGEST_LINE = 1 << 20
"""Bytes of a line; of a JSON file, which is read as a whole, those of the file count."""
_LARGEST_JSON = 1 << 29
_NAMED = 8
"""Columns that an error names."""


class ColumnError(ValueError):
    """The prompt's column is not there, or several could be it."""


class Lines:
    """Iterates over the decoded lines of a UTF-8 file, and knows the number and the place of the current line.

    Lines end at a newline byte and nowhere else: U+2028, U+0085 or a form feed belong to the text.
    """

    def __init__(self, path: Path, file: BinaryIO, whole: bool = False) -> None:
        """``whole``: the file is read as a whole, so that a line may be as long as it."""
        self.path = path
        self._longest = _LARGEST_JSON if whole else _LONGEST_LINE
        self._whole = whole
        self.number = 0  # number of the current line, from 1
        self.start = self.end = 0  # byte offsets of the current line
        self._file = file

    def __iter__(self) -> Iterator[str]:
        size = os.fstat(self._file.fileno()).st_size
        if self._whole and size > _LARGEST_JSON:
            raise ValueError(
                f"{self.path}: the file has {size:,} bytes, and JSON is read as a whole; write one object per line and "
                "let the name end in .jsonl, which may be of any size"
            )
        self._file.seek(0)
        head = self._file.read(len(_BOM))
        if head.startswith(_UTF16):
            raise self.bad_row("the file is UTF-16 or UTF-32, not UTF-8", _TO_UTF8, 1)
        self.number, self.end = 0, len(_BOM) if head == _BOM else 0
        self._file.seek(self.end)
        while raw := self._file.readline(self._longest + 1):
            self.start = self.end
            self.end += len(raw)
            self.number += 1
            if b"\0" in raw:
                raise self.bad_row(
                    f"byte {raw.index(0) + 1} of the line is 0 (NUL), so this is UTF-16 or no text file",
                    _TO_UTF8,
                )
            if len(raw) > self._longest:
                raise self.bad_row(
                    f"the line has more than {self._longest:,} bytes, so it is no prompt",
                    "check that the file is a list of prompts, with one on each line",
                )
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


def is_blank(text: str) -> bool:
    """Return whether nothing of a text can be seen: it has only spaces, control and zero-width characters."""
    if text[:1].isalnum():
        return False
    return all(unicodedata.category(character) in _UNSEEN for character in text)


DECODER = Decoder(object_pairs_hook=unique_keys)
"""Parses JSON. It raises ValueError also for an object that has a key twice, of which json.loads keeps the last."""


def check_text(lines: Lines, what: str, prompt: object, line: int | None = None) -> str:
    """Return the prompt of a row, stripped of blanks at both ends.

    Raise ValueError, naming the line, unless it is a string that can be seen. ``what`` names the prompt in the error.
    """
    if not isinstance(prompt, str):
        found = "missing" if prompt is None else shortened(repr(prompt))
        raise lines.bad_row(
            f"{what} is {found}, but must be a string with text", "delete the row or fill it in", line
        )
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise lines.bad_row(
            f"{what} has half of a \\u surrogate pair, which is not a character",
            "write the character itself, in UTF-8",
            line,
        )
    if "\0" in prompt:
        raise lines.bad_row(f"{what} has the character \\u0000 (NUL)", "remove it from the prompt", line)
    if is_blank(prompt):
        raise lines.bad_row(
            f"{what} is empty, but must be a string with text", "delete the row or fill it in", line
        )
    return prompt.strip()


def pick_column(path: Path, what: str, names: Sequence[str], column: str | None, choose: str) -> int:
    """Return the position of the prompt's column in ``names``: that of ``column``, or of the only known name.

    ``choose`` begins the remedy: what the user does to name a column. Raise ColumnError if there is not exactly one.
    """
    wanted = KNOWN_NAMES if column is None else (column,)
    found = [i for i, name in enumerate(names) if (name if column else name.strip().casefold()) in wanted]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(shortened(repr(name)) for name in names[:_NAMED])
    if len(names) > _NAMED:
        listed += f" and {len(names) - _NAMED} more"
    if column is not None:
        problem = f"{what} {column!r} occurs {len(found)} times, but must occur once"
    else:
        problem = f"{len(found)} {what}s are named {', '.join(KNOWN_NAMES)}, but exactly one must be"
    raise ColumnError(f"{path}: {problem}; {choose} to one of its {what}s: {listed or 'it has none'}")
