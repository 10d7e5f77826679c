"""Every command of the documentation exists: its options and settings are read by the command's own parser."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, blocks, commands, engine_command, recipe

from vpo_engine.cli import COMMANDS
from vpo_engine.config_file import load_config, shipped_configurations
from vpo_engine.settings import groups

OTHERS = {"pip", "python3", "git", "cd", "cat", "mkdir", "cp", "ls", "source", ".", "export"} | {
    "tensorboard",
    "pytest",
    "hf",
    "pre-commit",
    "mkdocs",
    "ruff",
    "mypy",
    "lint-imports",
    "sbatch",
    "podman",
    "docker",
    "uv",
}
"""Programs that pages name beside those of the engine."""
PARSED = {"train", "sample", "evaluate", "rank", "plan", "export", "check-model"}
"""Commands that hand what they do to ``report_errors``, so that a test can read their words and stop."""
KEYS = {f"{group.key}.{one.name}" if group.key else one.name for group in groups() for one in group.settings}
CASES = [
    pytest.param(line, id=f"{page.stem}-{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "sh"
    for line in commands(block.text)
]


@pytest.mark.parametrize("line", CASES)
def test_a_command_of_the_documentation_is_understood(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in re.split(r" && ", line):
        found = engine_command(part)
        if found is None:
            _check_program(part)
            continue
        name, words = found
        assert name in COMMANDS or name.startswith("data."), f"vpo has no command {name}"
        if name in PARSED and not {"--help", "--list"} & set(words):
            module = importlib.import_module(COMMANDS[name].module)
            monkeypatch.setattr(module, "report_errors", lambda *_, **__: 0)
            assert module.main([word for word in words if word != "..."]) == 0, capsys.readouterr().err
            _check_settings(name, words)


def _check_settings(name: str, words: list[str]) -> None:
    """Every setting exists; those of a configuration that comes with the engine, or of none, load together with it."""
    settings = [word for word in words if re.match(r"[a-z_0-9.]+=", word)]
    assert [one for one in settings if _key(one) not in KEYS] == []
    files = [word for word in words if word.endswith(".yaml")]
    here = [file for file in files if file in shipped_configurations() or (ROOT / file).is_file()]
    if name in ("train", "plan") and (here or not files):
        load_config(str(ROOT / here[0]) if here and "/" in here[0] else (here[0] if here else None), settings)


def _key(setting: str) -> str:
    """Return the key of a setting; a key inside of a mapping, such as reward.weights.NAME, counts as the mapping."""
    key = setting.partition("=")[0]
    while key not in KEYS and "." in key:
        key = key.rpartition(".")[0]
    return key


def _check_program(part: str) -> None:
    """A program is one that pages may name; a script of the project that it runs exists."""
    words = shlex.split(part.partition("\n")[0], comments=True)
    assert words[0] in OTHERS | {"python", "torchrun"} or re.match(r"[A-Z_]+=", words[0]), words[0]
    scripts = [word for word in words if re.fullmatch(r"(bench|tests|tools|examples)/\S+\.(py|sh)", word)]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("folder", ["tutorials", "how_to"])
def test_tutorials_and_how_to_pages_are_run_or_say_why_not(folder: str) -> None:
    """A page with commands has the comment by which a test runs it, or each of its blocks says why it is not run."""
    missing = [
        f"{page.name}, line {block.line}"
        for page in sorted((ROOT / "docs" / folder).glob("*.md"))
        if recipe(page) is None
        for block in blocks(page)
        if not block.reason
    ]
    assert missing == []


def test_errors_that_a_page_quotes_are_errors_of_the_code() -> None:
    sources = [
        path
        for name in ("vpo_engine", "kernels")
        for path in (ROOT / name).rglob("*")
        if path.suffix in (".py", ".txt")
    ]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    page = (ROOT / "docs/how_to/when_it_fails.md").read_text(encoding="utf-8")
    quoted = [
        text
        for cell in re.findall(r'^\| (".*?) \|', page, re.MULTILINE)
        for text in re.findall('"(.+?)"', cell)
    ]
    assert len(quoted) > 12
    assert [text for text in quoted for piece in text.split("...") if piece.strip() not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_engine_stand_in_blocks_that_tests_read(page: Path) -> None:
    outside = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert (
        re.findall(
            r"^ {4}(?:\w+=\S+ )?(?:torchrun|vpo|pytest|python -m vpo_engine\S*) .*$", outside, re.MULTILINE
        )
        == []
    )


def test_a_comment_with_an_unknown_line_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- a test runs this page\nad to train: steps=1\n-->\n")
    with pytest.raises(ValueError, match="unknown line of the comment: ad to train"):
        recipe(page)
