"""Prompt files of strangers, in every layout."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

from fuzz_driver import clear_errors, flip, fuzz, trusted
from hypothesis import strategies as st

from vpo_engine.data.fingerprint import fingerprint
from vpo_engine.data.prompts import PromptFile
from vpo_engine.evaluation.suites import read_suite

SUFFIXES = st.sampled_from([".txt", ".csv", ".tsv", ".jsonl", ".json", ".TXT", ".Json"])
ODD = st.sampled_from(
    ["", " ", "\u2028", "\x85", "\x0c", "\x1b[31m", "\0", "\r", "a\rb", "\ufeff", "\u200b", '"', '""', "'", ",", "\t",
     "\ud800", "\\ud800", "</script>", "prompt", "name", "[", "{", "{}", "0001.mp4", "é", "🦊"]
)  # fmt: skip
TEXTS = ODD | st.text(max_size=12)
KEYS = (
    st.sampled_from(["prompt", "name", "caption", "prompt_en", "text", "dimension", "Prompt ", "x"]) | TEXTS
)
JSON = st.recursive(
    TEXTS | st.integers() | st.floats() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])


def encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


def read(path: Path, column: str | None = None) -> None:
    """Read a file, which is refused or read as a whole, and twice alike."""
    with clear_errors(naming=path.name):
        file = PromptFile(path, column)
        prompts = [file[number] for number in range(len(file))]
        assert prompts
        assert all(prompt == prompt.strip() != "" and "\0" not in prompt for prompt in prompts)
        assert all(file.place(number).startswith(str(path)) for number in range(min(3, len(file))))
        assert fingerprint(prompts) == fingerprint(PromptFile(path, column))
        "".join(prompts).encode()  # each can be written and printed
    with clear_errors():
        read_suite(str(path))


@fuzz(
    rows=st.lists(TEXTS, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    suffix=SUFFIXES,
    encoding=ENCODINGS,
)
def test_lines(folder: Path, rows: list[str], end: str, suffix: str, encoding: str) -> None:
    path = folder / f"p{suffix}"
    path.write_bytes(encoded(end.join(rows), encoding))
    read(path)


@fuzz(
    rows=st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=4),
    mark=st.sampled_from(",;\t"),
    suffix=SUFFIXES,
    column=st.none() | KEYS,
)
def test_tables(folder: Path, rows: list[list[str]], mark: str, suffix: str, column: str | None) -> None:
    path = folder / f"p{suffix}"
    path.write_bytes(encoded("\n".join(mark.join(row) for row in [["prompt", "x"], *rows]), "utf-8"))
    read(path, column)


@fuzz(value=JSON, suffix=SUFFIXES, lines=st.booleans(), ascii_only=st.booleans(), encoding=ENCODINGS)
def test_json(folder: Path, value: Any, suffix: str, lines: bool, ascii_only: bool, encoding: str) -> None:
    rows = value if lines and isinstance(value, list) else [value]
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path = folder / f"p{suffix}"
    path.write_bytes(encoded(text, encoding))
    read(path)


GOOD = {
    ".txt": "a fox\nein Bär\n\n3 dogs\n",
    ".csv": 'name,x\n"a fox, red",1\n"two\nlines",2\n',
    ".tsv": "prompt\tx\na fox\t1\n",
    ".jsonl": '{"prompt": "a fox"}\n{"prompt": "ein B\\u00e4r", "n": 1.5}\n',
    ".json": '[{"prompt_en": "a fox", "dimension": ["scene"]}, {"prompt_en": "a cat", "dimension": []}]',
}


@fuzz(
    suffix=st.sampled_from(sorted(GOOD)),
    places=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 60),
)
def test_damaged_files(folder: Path, suffix: str, places: list[tuple[int, int]], cut: int) -> None:
    path = folder / f"p{suffix}"
    content = flip(GOOD[suffix].encode(), places)
    path.write_bytes(content[: len(content) - cut] if cut < len(content) else content)
    read(path)


LINES = 10**5
"""Lines of a huge file. A check opens it three times and fetches every prompt twice, so a million lines take longer
than an example may, although nothing is wrong: a file of millions of prompts may be given, and its time is in
proportion."""
HUGE = {
    "deep lists": lambda: b"[" * 10**6,
    "deep objects": lambda: b'{"prompt":' * 10**5 + b'"a"' + b"}" * 10**5,
    "one long line": lambda: b"a" * (3 << 20),
    "an open quote": lambda: b'prompt,x\n"' + b"a\n" * LINES,
    "many columns": lambda: b",".join(b"c%d" % number for number in range(10**5)),
    "a number": lambda: b'{"prompt": "a", "n": ' + b"9" * 10**5 + b"}",
    "nothing but blanks": lambda: b" \n" * LINES,
    "a long key": lambda: b'{"' + b"k" * 10**6 + b'": 1}',
}


@fuzz(
    name=st.sampled_from(sorted(HUGE)),
    suffix=SUFFIXES,
    head=st.sampled_from([b"", codecs.BOM_UTF8, b"\n", b"prompt\n"]),
)
def test_huge_files(folder: Path, name: str, suffix: str, head: bytes) -> None:
    path = folder / f"p{suffix}"
    path.write_bytes(head + HUGE[name]())
    read(path)


@fuzz(kind=st.sampled_from(["pipe", "folder", "loop", "gone", "device", "holes"]), suffix=SUFFIXES)
def test_what_is_no_file(folder: Path, kind: str, suffix: str) -> None:
    path = folder / f"p{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "device"):
        with trusted():
            path.symlink_to(path if kind == "loop" else "/dev/zero")
    elif kind == "holes":
        with path.open("wb") as file:
            file.truncate(20 << 30)
    read(path)
