"""Commands and code of the documentation's pages, as tests run them.

A page is written for readers with published weights and a GPU. A test runs the same words on tiny models in the same
places. What differs stands in one comment of the page, in lines of three kinds:

    <!-- a test runs this page
    folders: cogvideox
    add to train: model.num_frames=9
    read "cuda" as "cpu"
    -->

``folders`` names what lies in the working directory before (``tests/test_doc_runs.py``). ``add to COMMAND`` gives words
that are put behind the words of each such command. ``read A as B`` replaces texts of the page's code and commands. A
block below ``<!-- not run: REASON -->`` is only parsed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_RUN = re.compile(r"^<!-- a test runs this page\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(
    r"^(?:<!-- not run: ([^\n]+) -->\n+)?```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_READ = re.compile(r"^read (.+) as (.+)$")
_ENGINE = re.compile(r"-m vpo_engine(?:\.([\w.]+))?(?: |$)")


@dataclass(frozen=True)
class Block:
    """A block of shell commands ("sh") or of Python code in a page. ``reason``: why it is not run, "" if it is."""

    language: str
    text: str
    line: int
    reason: str


@dataclass(frozen=True)
class Recipe:
    """The contents of a page's comment."""

    folders: tuple[str, ...] = ()
    added: dict[str, list[str]] = field(default_factory=dict)
    replaced: tuple[tuple[str, str], ...] = ()

    def read(self, text: str) -> str:
        for before, after in self.replaced:
            text = text.replace(before, after)
        return text


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[2], found[3], text.count("\n", 0, found.start(3)) + 1, found[1] or "")
        for found in _BLOCK.finditer(text)
    ]


def recipe(page: Path) -> Recipe | None:
    """Return what the comment of the page says, or None if no test runs the page. ValueError for an unknown line."""
    found = _RUN.search(page.read_text(encoding="utf-8"))
    if found is None:
        return None
    folders: tuple[str, ...] = ()
    added: dict[str, list[str]] = {}
    replaced: list[tuple[str, str]] = []
    for line in found[1].splitlines():
        key, _, rest = line.partition(": ")
        if key == "folders":
            folders = tuple(rest.split())
        elif key.startswith("add to "):
            added[key.removeprefix("add to ")] = shlex.split(rest)
        elif exchange := _READ.match(line):
            replaced.append((exchange[1], exchange[2]))
        else:
            raise ValueError(f"{page.name}: unknown line of the comment: {line}")
    return Recipe(folders, added, tuple(replaced))


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a block: continued lines are joined, comments left out, here-documents kept whole."""
    lines = iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines).strip()
        if here := re.search(r"<<'(\w+)'", line):
            for following in lines:
                line += f"\n{following}"
                if following == here[1]:
                    break
            yield line
        elif line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def engine_command(line: str) -> tuple[str, list[str]] | None:
    """Return the name and the words of a command of the engine as ``vpo`` has them; None for other programs.

    torchrun's own options are left out, as are what is redirected and what other commands follow after "&&".
    """
    words = shlex.split(line.partition("\n")[0], comments=True)
    for stop in ("&&", "|", ">", "&"):
        if stop in words:
            words = words[: words.index(stop)]
    if words[:1] == ["vpo"]:
        return words[1], words[2:]
    found = _ENGINE.search(line)
    if found is None or "-m" not in words:
        return None
    rest = words[words.index("-m") + 2 :]
    name = found[1]
    if name is None:
        return rest[0], rest[1:]
    return ("report" if name == "runs.report" else name.replace("_", "-")), rest
