"""The prompt files that a configuration names. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path

from vpo_engine.config import PromptsConfig
from vpo_engine.data.prompts import ColumnError, PromptFile

Opened = tuple[dict[str, PromptFile], list[str]]
"""Prompt files by the name of their setting, and notes about them."""
_checked: dict[str, Opened] = {}
"""What ``check_prompt_files`` has opened and nobody has taken yet, by the settings."""


def check_prompt_files(settings: PromptsConfig) -> None:
    """Raise ValueError for a bad row of the prompt files that are set.

    The next ``open_prompt_files`` of the same settings takes the files over, so that even large ones are read once,
    and before torch is imported.
    """
    _checked[repr(settings)] = _open(settings)


def open_prompt_files(settings: PromptsConfig) -> Opened:
    """Open the prompt files that are set, and return what is to be said about them. ValueError for a bad row."""
    found = _checked.pop(repr(settings), None)
    if found is not None and all(file.is_the_file_at_its_path for file in found[0].values()):
        return found
    return _open(settings)


def count_prompts(path: Path, column: str | None) -> int:
    """Return the number of prompts of one of a run's files. ``column``: prompts.column, which the other may have."""
    try:
        return len(PromptFile(path, None if path.suffix.lower() == ".txt" else column))
    except ColumnError:
        return len(PromptFile(path))


def _open(settings: PromptsConfig) -> Opened:
    """Open the prompt files that are set, and say where prompts.column is not used.

    The column must be in one of the files. In the other one, if it has no such column, the usual names are tried.
    """
    paths = {"train": settings.train, "held_out": settings.held_out}
    given = {name: path for name, path in paths.items() if path is not None}
    tables = {name for name, path in given.items() if path.suffix.lower() != ".txt"}
    column, files, notes = settings.column, dict[str, PromptFile](), list[str]()
    without: dict[str, ColumnError] = {}
    for name, path in given.items():
        try:
            files[name] = PromptFile(path, column if name in tables else None)
        except ColumnError as error:
            without[name] = error
    for name, missing in without.items():
        if column is None or set(without) == tables:
            raise missing
        files[name] = PromptFile(given[name])
        notes.append(
            f"note: {given[name]} has no column {column!r} (prompts.column); the usual names were tried"
        )
    if column is not None and given and not tables:
        notes.append(f"note: prompts.column={column} is not used: .txt files have no columns")
    return files, notes
