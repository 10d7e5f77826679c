"""The documents point to what exists: links of all pages, and the files that the tour of the code names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOUR = ROOT / "docs" / "architecture.md"
FOLDERS = [ROOT, ROOT / "vpo_engine", ROOT / "kernels", ROOT / "tests"]
"""The folders from which paths in the tables of the tour are written."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_points_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [file for file in files if file and not (page.parent / file).exists()] == []


def test_every_file_in_the_tables_of_the_tour_exists() -> None:
    rows = [line for line in TOUR.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    names = {name for row in rows for code in re.findall(r"`([^`]+)`", row) for name in _files(code)}
    assert len(names) > 30
    assert sorted(name for name in names if not _exists(name)) == []


def test_the_page_of_a_new_model_followed_word_by_word_gives_its_file() -> None:
    """The blocks of code in docs/new_model.md, one after the other; only empty lines may lie between them."""
    page = (ROOT / "docs/new_model.md").read_text(encoding="utf-8")
    written = "".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    file = (ROOT / "vpo_engine/models/ltx.py").read_text(encoding="utf-8")
    lines, own = ([line for line in text.splitlines() if line] for text in (written, file))
    assert lines == own
    assert len(file.splitlines()) < 150


def _files(code: str) -> list[str]:
    """Return the names of Python files in a piece of code, without patterns such as ``rewards/NAME.py``."""
    names = re.findall(r"[\w./*]+\.py\b", code)
    return [name for name in names if "*" not in name and "NAME" not in name]


def _exists(name: str) -> bool:
    """Return whether a file of this name is in the tree; a bare name may be in a folder below."""
    if any((folder / name).is_file() for folder in FOLDERS):
        return True
    return "/" not in name and any(next(folder.rglob(name), None) for folder in FOLDERS[1:])
