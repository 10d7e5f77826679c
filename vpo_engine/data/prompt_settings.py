"""The prompt files that a configuration names. Nothing heavy is imported here."""

from __future__ import annotations

from vpo_engine.config import PromptsConfig
from vpo_engine.data.prompts import ColumnError, PromptFile

_SMALL = 16 * 2**20
"""Bytes up to which a file is read twice, the first time before torch is imported."""


def open_prompt_files(settings: PromptsConfig) -> tuple[dict[str, PromptFile], list[str]]:
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


def check_small_prompt_files(settings: PromptsConfig) -> None:
    """Raise ValueError for a bad row of prompt files that take no time to read."""
    paths = [path for path in (settings.train, settings.held_out) if path is not None]
    if paths and sum(path.stat().st_size for path in paths) <= _SMALL:
        open_prompt_files(settings)
