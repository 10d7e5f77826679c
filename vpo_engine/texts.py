"""Read texts that somebody else may have written, and print for a terminal.

Files are read only if they are regular files of a plausible size: a pipe would be waited for, a device never ends.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

MOST_BYTES = 256 << 20
"""Bytes of the largest file that is read as a whole, unless the caller knows better."""
_MOST_DIGITS = 300
"""Digits of a whole number; with more of them it may be no float any more."""
_SHOWN = 300
"""Characters of a value or of a path that an error quotes."""
_ACTING = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that a terminal acts on, or cannot show."""
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of writing, so that a line reads as what it is not."""
_MARKS = re.compile(r"[\\`*\[\]<>#|~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Characters that mean something in Markdown; an underscore inside a word does not."""
_DEEP = "lists and objects lie too deep inside one another"


def counted(count: int, noun: str) -> str:
    """Return "1 video", "2 videos" and so on, of a noun that takes an "s"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def why_no_file(path: Path, what: str = "file") -> str | None:
    """Return why a path cannot be read as a file, with the remedy; None if it is a regular file.

    what: what errors call the file.
    """
    shown = one_line(shortened(str(path)))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return f"there is no {what} {shown}; check the path"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"{shown} cannot be read ({reason}); check the path and its permissions"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return f"{shown} is a folder; give a {what}"
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) else "no regular file"
    return f"{shown} is {kind}; write the content to a file first, and give that"


def read_text(path: Path, what: str = "file", most: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raise ValueError, with the remedy, for what is no regular file, has more than ``most`` bytes, or is not UTF-8.
    """
    if reason := why_no_file(path, what):
        raise ValueError(reason)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, so it is no {what}; check the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raise ValueError also where Python's reader would lose something or raise another error: a key that stands twice,
    NaN and numbers beyond a float, values that lie too deep, and halves of surrogate pairs, which no file can hold.
    """
    found = _STRICT.decode(text)
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a \\u surrogate pair, which is not a character") from None
        except RecursionError:
            raise ValueError(_DEEP) from None
    return found


def read_json(path: Path, what: str = "file", most: int = MOST_BYTES) -> Any:
    """Return the value of a JSON file; ValueError as in ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path, what, most))


class Decoder(json.JSONDecoder):
    """A JSON decoder that raises ValueError for values that lie too deep, and nothing but ValueError."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            raise ValueError(_DEEP) from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these entries; ValueError names a key that is there twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shortened(repr(twice))} is there twice")
    return found


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shortened(text)} is too large")
    return number


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


_STRICT = Decoder(
    object_pairs_hook=unique_keys, parse_int=_whole, parse_float=_number, parse_constant=_no_number
)


def shortened(text: str, most: int = _SHOWN) -> str:
    """Return a text, cut off if it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    r"""Return a text in which a terminal finds nothing to act on: control characters and those
    that turn the direction of writing become escapes like \x1b. Line breaks and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character in "\n\t" or not (unicodedata.category(character) in _ACTING or character in _TURNING):
        return character
    return ascii(character)[1:-1]


def one_line(text: str) -> str:
    """Return a text as ``printable`` does, with escapes also for line breaks and tabs, so that it stays in its line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def markdown(text: str) -> str:
    """Return Markdown that shows a text as it is, in one line, also in the cell of a table."""
    return _MARKS.sub(r"\\\g<0>", one_line(text))


def code_span(text: str) -> str:
    """Return Markdown that shows a text as code, whatever backticks it has."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{blank}{one_line(text)}{blank}{fence}"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line that may hold texts of others; characters that the stream cannot show become escapes."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


def refuse_undecodable(words: Sequence[str]) -> None:
    """Raise ValueError for a word of the command line that is not UTF-8: no file could name it later."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ValueError(
                f"{os.fsencode(word)!r} is not UTF-8; rename the file, or write the word in UTF-8"
            )
