"""Complete the documentation while mkdocs builds it. mkdocs.yml names this file as a hook.

Three things are filled in, so that they stand in one place of the project only:

- ``<!-- help: COMMAND -->`` in a page becomes the text that ``vpo COMMAND --help`` prints.
- Markdown files of the project's root, such as CONTRIBUTING.md, become pages of the section "Project".
- A link from a page to a file outside of docs/ leads to a page that shows this file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROJECT_PAGES = {
    "CONTRIBUTING.md": ("Contributing", "project/contributing.md"),
    "CHANGELOG.md": ("Changes", "project/changelog.md"),
    "SECURITY.md": ("Security policy", "project/security.md"),
    "CITATION.cff": ("Citation", "project/citation.md"),
    "LICENSE": ("Licence", "project/licence.md"),
    "NOTICE": ("Notices", "project/notice.md"),
}
"""Files of the root: the name of their page in the navigation, and its path. Those that do not exist are left out."""
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_HELP = re.compile(r"^<!-- help: ([\w-]+) -->$", re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".sh": "sh", ".cff": "yaml"}
_WIDTH = "100"
"""Columns of the help texts."""


def on_config(config: Any) -> Any:
    """Add the section "Project" to the navigation."""
    here = {name: page for name, page in PROJECT_PAGES.items() if (ROOT / name).is_file()}
    config.nav.append({"Project": [{title: path} for title, path in here.values()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the project's root, and one for each file outside of docs/ to which a page links."""
    waiting = [ROOT / name for name in PROJECT_PAGES if (ROOT / name).is_file()]
    for page in files.documentation_pages():
        text = Path(str(page.abs_src_path)).read_text(encoding="utf-8")
        waiting += _outside(text, Path(str(page.abs_src_path)).parent)
    done: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file in done:
            continue
        done.add(file)
        content = _page_of(file)
        files.append(File.generated(config, _page_path(file), content=content))
        if file.suffix == ".md":
            waiting += _outside(content, file.parent)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in help texts, and let links out of docs/ lead to the pages of their files."""
    markdown = _HELP.sub(lambda found: f"```text\n{help_text(found[1])}```", markdown)
    origins = {_page_path(ROOT / name): ROOT for name in PROJECT_PAGES}
    source = PurePosixPath(page.file.src_uri)
    folder = origins.get(str(source), ROOT / "docs" / source.parent)
    if source.parts[0] == "source":
        folder = ROOT.joinpath(*source.parts[1:-1])
    return _LINK.sub(lambda found: _rewritten(found, folder, source), markdown)


def help_text(command: str) -> str:
    """Return what ``vpo COMMAND --help`` prints. ValueError if there is no such command."""
    from vpo_engine import cli

    if command != "vpo" and command not in cli.COMMANDS:
        raise ValueError(f"vpo has no command {command}; the commands are {', '.join(cli.COMMANDS)}")
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.main(["--help"] if command == "vpo" else [command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


def _outside(text: str, folder: Path) -> Iterator[Path]:
    """Yield the files of the project, outside of docs/, to which a text in ``folder`` links."""
    for found in _LINK.finditer(text):
        target = (folder / found[1]).resolve()
        if "://" not in found[1] and target.is_file() and _leaves(target):
            yield target


def _leaves(target: Path) -> bool:
    """Return whether a file is one of the project but not of docs/. README.md is the first page."""
    return (
        target.is_relative_to(ROOT)
        and not target.is_relative_to(ROOT / "docs")
        and target.name != "README.md"
    )


def _rewritten(found: re.Match[str], folder: Path, source: PurePosixPath) -> str:
    """Return a link of the page ``source``, whose links are written from ``folder``, as mkdocs resolves it."""
    target = (folder / found[1]).resolve()
    if "://" in found[1] or not target.exists() or not target.is_relative_to(ROOT):
        return found[0]
    if target == ROOT / "README.md":
        path = "index.md"
    elif target.is_relative_to(ROOT / "docs"):
        path = target.relative_to(ROOT / "docs").as_posix()
    elif target.is_file():
        path = _page_path(target)
    else:
        return found[0]
    return f"]({os.path.relpath(path, source.parent)}{found[2] or ''})"


def _page_path(file: Path) -> str:
    """Return the path of the page that shows a file of the project."""
    name = file.relative_to(ROOT).as_posix()
    if name in PROJECT_PAGES:
        return PROJECT_PAGES[name][1]
    return f"source/{name}" if file.suffix == ".md" else f"source/{name}.md"


def _page_of(file: Path) -> str:
    """Return the page of a file: markdown as it is, anything else as a block of code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    name = file.relative_to(ROOT).as_posix()
    language = _LANGUAGES.get(file.suffix, "text")
    fence = "`" * (max((len(run) for run in re.findall(r"`{3,}", text)), default=2) + 1)
    return f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n{fence}{language}\n{text}\n{fence}\n"
