"""Call commands as people do, and check that what they say is for people: one clear error, and no traceback."""

from __future__ import annotations

import contextlib
import io
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

LONGEST_MESSAGE = 4000
"""Characters of an error. A message may list several settings, but never repeats a file."""


class Ended(NamedTuple):
    """The end of a command."""

    code: int
    out: str
    err: str


def call(main: Callable[[Sequence[str]], int | None], words: Sequence[str]) -> Ended:
    """Call a command. Whatever it raises but SystemExit is the failure of the test.

    Its exit code is 0, 1 or 2; with 1 its last words are one error that is not long; and no character reaches the
    terminal on which a terminal acts.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(words)) or 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=err)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    ended = Ended(code, out.getvalue(), err.getvalue())
    assert code in (0, 1, 2), ended
    assert "Traceback" not in ended.err, ended
    for character in set(ended.out + ended.err) - {"\n", "\t", "\r"}:
        assert unicodedata.category(character) not in ("Cc", "Cs"), (hex(ord(character)), ended)
    if code == 1:
        start = ended.err.find("error: ")
        message = ended.err[start:]
        assert start >= 0, ended
        assert 20 < len(message) < LONGEST_MESSAGE, ended
        assert "\n\n" not in message.strip(), ended
    return ended
