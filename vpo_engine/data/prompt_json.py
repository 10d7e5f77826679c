"""The prompts of a JSON file, which is read whole: lists and objects in the layouts that public prompt lists have."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from vpo_engine.data.prompt_lines import DECODER, KNOWN_NAMES, Lines, check_text, pick_column
from vpo_engine.texts import Decoder, shortened

_LISTS = (*KNOWN_NAMES, "prompts", "captions", "data")
"""Names of an object's entry that holds the list of prompts."""
_KNOWN = (
    "known are a list of texts or of objects, an object of names with texts or with objects, and an object with such a "
    "list under prompts, captions or data"
)
_FILE_NAME = re.compile(r"\S+\.(mp4|webm|mkv|mov|avi|gif|png|jpe?g|webp|txt)", re.IGNORECASE)
_HEAD_BYTES = 1 << 16
_ANY = Decoder()
"""Finds out whether a text is JSON at all."""
_BLANKS = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class _Entry:
    """A value of a list, or of an object under ``key``, in line ``line``; it begins at ``place`` of the text."""

    line: int
    place: int
    key: str | None
    value: Any


def is_json_file(lines: Lines) -> bool:
    """Return whether a file is JSON as a whole, and not an object per line."""
    content = list(islice((text for text in lines if text.strip()), 2))
    if not content or content[0].lstrip()[0] != "{":
        return bool(content)
    try:
        _ANY.decode(content[0])
    except ValueError:
        return True
    return len(content) == 1


def begins_with_list(file: BinaryIO) -> bool:
    """Return whether the first character that is no blank is a bracket; only the beginning of the file is looked at."""
    head = os.pread(file.fileno(), _HEAD_BYTES, 0)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_json(lines: Lines, column: str | None, choose: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each prompt. Raise ValueError, naming line and remedy, for what is no prompt list.

    ``column`` names the key of the prompt in each object, or of the list in the outermost one.
    """
    text = "".join(lines)
    try:
        _ANY.decode(text)
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        remedy = "repair the file, or write one object per line and let its name end in .jsonl"
        raise lines.bad_row(f"not JSON ({error})", remedy, line) from error
    start = _BLANKS.match(text)
    assert start is not None
    outermost = start.end()
    if text[outermost] not in "[{":
        raise lines.bad_row(
            f"the file is a single JSON value, but must hold a list; {_KNOWN}", "write a list", 1
        )
    entries = list(_entries(lines, text, outermost))
    if text[outermost] == "{":
        inner = _inner_list(entries, column)
        if inner is not None:
            column = None if inner.key == column else column
            entries = list(_entries(lines, text, inner.place))
        else:
            _check_names(lines, entries, column)
    return _prompts(lines, entries, column, choose)


def _entries(lines: Lines, text: str, place: int) -> Iterator[_Entry]:
    """Yield what the list or object that begins at ``place`` of valid JSON holds. An object may have a key twice."""
    names = text[place] == "{"
    line, counted = text.count("\n", 0, place) + 1, place
    place = _skip(text, place + 1)
    while text[place] not in "]}":
        line += text.count("\n", counted, place)
        counted, key = place, None
        try:
            if names:
                key, place = DECODER.raw_decode(text, place)
                place = _skip(text, _skip(text, place) + 1)  # the colon
            start = place
            value, place = DECODER.raw_decode(text, place)
        except ValueError as error:
            raise lines.bad_row(str(error), "keep each key once", line) from error
        yield _Entry(line, start, key, value)
        place = _skip(text, place)
        if text[place] == ",":
            place = _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    blanks = _BLANKS.match(text, place)
    assert blanks is not None
    return blanks.end()


def _inner_list(entries: Sequence[_Entry], column: str | None) -> _Entry | None:
    """Return the entry of the outermost object that holds the list of prompts, if there is one."""
    lists = [entry for entry in entries if isinstance(entry.value, list)]
    if len(entries) == 1 and lists:
        return lists[0]
    named = [entry for entry in lists if entry.key == column]
    if not named:
        named = [entry for entry in lists if str(entry.key).strip().casefold() in _LISTS]
    return named[0] if len(named) == 1 else None


def _check_names(lines: Lines, entries: Sequence[_Entry], column: str | None) -> None:
    """Raise ValueError unless the outermost object is one of names with texts, or of names with objects."""
    keys = [str(entry.key) for entry in entries]
    shown = ", ".join(shortened(repr(key)) for key in keys[:8]) + (
        f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    )
    kinds = {type(entry.value) for entry in entries}
    remedy = "write the prompts as a list of texts, or one a line in a .txt file"
    if kinds and kinds not in ({str}, {dict}):
        raise lines.bad_row(f"an object with the keys {shown} is no known layout: {_KNOWN}", remedy, 1)
    if kinds == {str} and (column in keys or any(key.strip().casefold() in KNOWN_NAMES for key in keys)):
        raise lines.bad_row(
            f"the file is one object with the keys {shown}, not a list of such objects",
            "write [ before it and ] behind it",
            1,
        )
    if kinds == {str} and all(_FILE_NAME.fullmatch(entry.value.strip()) for entry in entries):
        raise lines.bad_row(
            f"the object gives file names, such as {entries[0].value!r} for {keys[0]!r}: the prompts may be its keys, "
            "which could also be names",
            "write the prompts as a list of texts, or as an object of file names with prompts",
            entries[0].line,
        )


def _prompts(
    lines: Lines, entries: Sequence[_Entry], column: str | None, choose: str
) -> Iterator[tuple[int, str]]:
    key: str | None = None
    of_texts = bool(entries) and isinstance(entries[0].value, str)
    for number, entry in enumerate(entries):
        if isinstance(entry.value, str) != of_texts or not isinstance(entry.value, str | dict):
            expected = "text" if of_texts else "an object" if number else "text or an object"
            raise lines.bad_row(
                f"entry {number + 1} is a JSON {type(entry.value).__name__}, but must be {expected}",
                "write every prompt in the same way",
                entry.line,
            )
        if isinstance(entry.value, str):
            yield entry.line, check_text(lines, f"entry {number + 1}", entry.value, entry.line)
            continue
        row = entry.value
        if column is None and key is None and _is_name_with_text(row):
            prompt = next(iter(row.values()))
            yield entry.line, check_text(lines, f"entry {number + 1}", prompt, entry.line)
            continue
        if key is None:
            key = list(row)[pick_column(lines.path, "key", list(row), column, choose)]
        what = f"the prompt ({key!r}) of entry {number + 1}"
        yield entry.line, check_text(lines, what, row.get(key), entry.line)


def _is_name_with_text(row: dict[str, Any]) -> bool:
    """Return whether an object of a list is a name with a text, such as {"0001.mp4": "a fox"}."""
    return len(row) == 1 and not any(name.strip().casefold() in KNOWN_NAMES for name in row)
