"""The layouts of prompt files whose rows stay on disk: plain lines, tables and JSON Lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Literal, Protocol

from vpo_engine.data.prompt_lines import DECODER, Lines, check_text, is_blank, pick_column


class Layout(Protocol):
    """A way to find the prompts of a file, and to read one of them again."""

    def rows(self) -> Iterator[tuple[int, str]]:
        """Yield the byte offset and the prompt of each row. Raise ValueError, naming the line, for a bad one."""
        ...

    def parse(self, raw: bytes) -> str:
        """Return the prompt of a row from its bytes, to which those up to the next row belong."""
        ...


class PlainLines:
    """A prompt per line; blank lines are no prompts."""

    def __init__(self, lines: Lines, column: str | None) -> None:
        if column is not None:
            raise ValueError(
                f"{lines.path}: column={column!r} cannot be used, a {lines.path.suffix} file has no columns; leave it "
                "out"
            )
        self._lines = lines

    def rows(self) -> Iterator[tuple[int, str]]:
        first = True
        for text in self._lines:
            if is_blank(text):
                continue
            prompt = text.strip()
            if "\r" in prompt:
                raise self._lines.bad_row(
                    "a carriage return stands inside the line, as where lines end in the way of old Macs",
                    "convert the line endings (tr '\\r' '\\n' < FILE > NEW)",
                )
            if first and _is_json(prompt):
                raise self._lines.bad_row(
                    "the file begins with JSON, of which every line would be a prompt",
                    "let its name end in .jsonl (an object per line) or .json",
                )
            first = False
            yield self._lines.start, prompt

    def parse(self, raw: bytes) -> str:
        return raw.split(b"\n", 1)[0].decode().strip()


def _is_json(text: str) -> bool:
    if text in ("[", "{"):
        return True
    try:
        return isinstance(DECODER.decode(text), dict | list)
    except ValueError:
        return False


class Table:
    """A header, then a prompt per row, with fields between ``delimiter``s.

    Quoted fields may contain line breaks. Without ``quotes`` a quotation mark is a character like any other.
    """

    def __init__(
        self,
        lines: Lines,
        column: str | None,
        choose: str,
        delimiter: str | None = None,
        *,
        quotes: bool = True,
    ) -> None:
        """``delimiter``: None takes a comma, or what the header has in its place: a tab or a semicolon."""
        self._lines, self._column, self._choose = lines, column, choose
        self._delimiter = delimiter or _delimiter_of(lines)
        self._quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        self._position = 0

    def rows(self) -> Iterator[tuple[int, str]]:
        rows = self._fields()
        header = next(rows, (0, 0, []))[2]
        self._position = pick_column(self._lines.path, "column", header, self._column, self._choose)
        for start, line, row in rows:
            if len(row) != len(header):
                raise self._lines.bad_row(
                    f"the row has {len(row)} fields, but the header has {len(header)}",
                    f"put quotes around fields that contain {self._separators()}, and complete rows that lack fields",
                    line,
                )
            if self._quoting == csv.QUOTE_NONE and any(
                len(each) > 1 and each[0] == each[-1] == '"' for each in row
            ):
                raise self._lines.bad_row("a field is in quotes", "quote all such fields, or none", line)
            prompt = row[self._position]
            if is_blank(prompt):
                what = f"the prompt ({header[self._position]!r}) is empty"
                raise self._lines.bad_row(what, "delete the row or fill it in", line)
            yield start, prompt.strip()

    def check(self) -> None:
        """Raise what ``rows`` raises."""
        for _ in self.rows():
            pass

    def parse(self, raw: bytes) -> str:
        return next(self._reader(iter([raw.decode()])))[self._position].strip()

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, quoting=self._quoting, strict=True)

    def _separators(self) -> str:
        return {",": "commas", "\t": "tabs", ";": "semicolons"}[self._delimiter]

    def _fields(self) -> Iterator[tuple[int, int, list[str]]]:
        """Yield (byte offset, number of the first line, fields) of each row that is not blank."""
        lines = self._lines
        iterator = iter(lines)
        rows = self._reader(iterator)
        start, line = 0, 1
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise lines.bad_row(
                    f"the row that begins here is not {'CSV' if self._delimiter != chr(9) else 'TSV'} ({error})",
                    f"put quotes around a field with quotes, {self._separators()} or line breaks, and write "
                    '" inside it as ""',
                    line,
                ) from error
            if row is None:
                return
            if row:
                yield start, line, row
            start, line = lines.end, lines.number + 1


def _delimiter_of(lines: Lines) -> str:
    header = next((text for text in lines if text.strip()), "")
    return next((mark for mark in ",\t;" if mark in header), ",")


class JsonLines:
    """An object per line, with the prompt under the same key in all of them; blank lines are no prompts."""

    def __init__(self, lines: Lines, column: str | None, choose: str) -> None:
        self._lines, self._column, self._choose = lines, column, choose
        self._key = ""

    def rows(self) -> Iterator[tuple[int, str]]:
        first = True
        for text in self._lines:
            if not text.strip():
                continue
            try:
                row = DECODER.decode(text)
            except ValueError as error:
                raise self._lines.bad_row(f"not JSON ({error})", "write one JSON object per line") from error
            if not isinstance(row, dict):
                raise self._lines.bad_row(
                    f"JSON {type(row).__name__}, but must be an object", "write one object per line"
                )
            if first:
                names = list(row)
                self._key = names[pick_column(self._lines.path, "key", names, self._column, self._choose)]
            first = False
            yield (
                self._lines.start,
                check_text(self._lines, f"the prompt ({self._key!r})", row.get(self._key)),
            )

    def parse(self, raw: bytes) -> str:
        prompt: str = DECODER.decode(raw.split(b"\n", 1)[0].decode())[self._key]
        return prompt.strip()
