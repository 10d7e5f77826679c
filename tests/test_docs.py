"""The documents point to what exists: links of all pages, the files that the tour of the code names, and the site."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import vpo_kernels
import yaml
from doc_pages import PAGES, ROOT

from vpo_engine.cli import COMMANDS
from vpo_engine.config import Config
from vpo_engine.train import train
from vpo_engine.trainer import Trainer

DOCS = ROOT / "docs"
TOUR = ROOT / "docs" / "architecture.md"
FOLDERS = [ROOT, ROOT / "vpo_engine", ROOT / "kernels", ROOT / "tests"]
"""The folders from which paths in the tables of the tour are written."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_points_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [file for file in files if file and not (page.parent / file).exists()] == []


def test_every_file_in_the_tables_of_the_tour_exists() -> None:
    rows = [line for line in TOUR.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    names = {name for row in rows for code in re.findall(r"`([^`]+)`", row) for name in _files(code)}
    assert len(names) > 30
    assert sorted(name for name in names if not _exists(name)) == []


@pytest.mark.usefixtures("unplanned")
def test_a_prompt_takes_the_hops_of_the_tour_in_this_order(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions that the tour names are called in its order between the prompt and the optimizer step."""
    called: list[tuple[str, str]] = []
    train_step = Trainer._train_step

    def followed(trainer: Trainer, step: int) -> None:
        sys.setprofile(_note_calls(called))
        try:
            train_step(trainer, step)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Trainer, "_train_step", followed)
    train(small("steps=1", "evaluation.every=null"))
    tour = TOUR.read_text(encoding="utf-8").partition("\n## One prompt")[2].partition("\n## ")[0]
    hops = re.findall(r"^\| \d+ \| [^`|]*`([^`]+)`.*\| `([^`]+)` \|$", tour, re.MULTILINE)
    first = [
        next(i for i, (file, name) in enumerate(called) if _is_hop(file, name, place, function))
        for function, place in hops
    ]
    assert first == sorted(first)
    files = len({place for _, place in hops})
    assert f"That is {len(hops)} hops through {files} files" in tour
    assert len(hops) <= 20
    assert files <= 12


def test_the_page_of_a_new_model_followed_word_by_word_gives_its_file() -> None:
    """The blocks of code in docs/new_model.md, one after the other; only empty lines may lie between them."""
    page = (ROOT / "docs/new_model.md").read_text(encoding="utf-8")
    written = "".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    file = (ROOT / "vpo_engine/models/ltx.py").read_text(encoding="utf-8")
    lines, own = ([line for line in text.splitlines() if line] for text in (written, file))
    assert lines == own
    assert len(file.splitlines()) < 150


def test_every_page_is_in_the_navigation() -> None:
    """The navigation names each page of docs/ once, and no other."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = sorted(_leaves(settings["nav"]))
    assert listed == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS))


def test_the_reference_has_every_command_and_every_function_of_the_kernels() -> None:
    helps = re.findall(
        r"^<!-- help: ([\w-]+) -->$", (DOCS / "reference/commands.md").read_text(), re.MULTILINE
    )
    named = re.findall(r"^::: vpo_kernels\.(\w+)$", (DOCS / "reference/kernels.md").read_text(), re.MULTILINE)
    assert helps == ["vpo", *COMMANDS]
    assert sorted(named) == sorted(vpo_kernels.__all__)


def test_parameters_in_a_docstring_become_a_list() -> None:
    listed = pytest.importorskip("tools.docs_parameters").listed
    text = "Compute the loss.\n\nbeta: half of it. mask, weight: see above;\nbeta_sum: none."
    expected = (
        "Compute the loss.\n\n- **beta**: half of it.\n\n- **mask, weight**: see above;\nbeta_sum: none."
    )
    assert listed(text, ["beta", "mask", "weight"]) == expected


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs.config")
    build = pytest.importorskip("mkdocs.commands.build")
    config = mkdocs.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    config.plugins.on_startup(command="build", dirty=False)
    build.build(config)
    loaded = r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^\s>]*"
    remote = {found for page in tmp_path.rglob("*.html") for found in re.findall(loaded, page.read_text())}
    assert {found for found in remote if 'rel="canonical"' not in found} == set()
    styles = {
        found for sheet in tmp_path.rglob("*.css") for found in re.findall(r"url\(https?:", sheet.read_text())
    }
    assert styles == set()
    commands = (tmp_path / "reference/commands.html").read_text()
    assert "torchrun -m vpo_engine.train [CONFIG.yaml]" in commands
    assert "<!-- help:" not in commands
    assert "reference_winner" in (tmp_path / "reference/kernels.html").read_text()
    assert (tmp_path / "source/vpo_engine/models/ltx.py.html").is_file()


def _leaves(entries: object) -> Iterator[str]:
    """Yield the pages of a navigation: a text is one, lists and mappings hold others."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        for value in entries.values():
            yield from _leaves(value)
    elif isinstance(entries, list):
        for entry in entries:
            yield from _leaves(entry)


def _note_calls(called: list[tuple[str, str]]) -> Callable[[FrameType, str, object], None]:
    """Return a profiler that appends the file and the name of every Python function that is called."""

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    return note


def _is_hop(file: str, name: str, place: str, function: str) -> bool:
    """Return whether a call is that of the tour's ``function``, in the file that the tour writes as ``place``."""
    if place == "rewards/NAME.py":
        return "/vpo_engine/rewards/" in file and name.endswith(f".{function}")
    return file.endswith(f"/{place}") and name == function


def _files(code: str) -> list[str]:
    """Return the names of Python files in a piece of code, without patterns such as ``rewards/NAME.py``."""
    names = re.findall(r"[\w./*]+\.py\b", code)
    return [name for name in names if "*" not in name and "NAME" not in name]


def _exists(name: str) -> bool:
    """Return whether a file of this name is in the tree; a bare name may be in a folder below."""
    if any((folder / name).is_file() for folder in FOLDERS):
        return True
    return "/" not in name and any(next(folder.rglob(name), None) for folder in FOLDERS[1:])
