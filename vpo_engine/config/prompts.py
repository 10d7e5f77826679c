"""Settings of prompts."""

from __future__ import annotations

from pathlib import Path

from vpo_engine.config.section import Section


class PromptsConfig(Section):
    """The files that prompts come from. Without files, the sprites world has captions of its own."""

    train: Path | None = None
    """File of training prompts: .txt (a prompt per line), .csv, .tsv, .jsonl or .json (see docs/prompts.md); null: the
    captions of the sprites world."""
    held_out: Path | None = None
    """File of held-out prompts, of the same kinds; null: the held-out captions of the sprites world."""
    column: str | None = None
    """Column of a .csv or .tsv file, or key of the objects in a .jsonl or .json file; null: the usual names are tried.
    It is not used for a .txt file. If only one of the two files has it, the usual names are tried for the other."""
    cache: Path | None = None
    """Folder of text embeddings, which runs may share; null: the folder embeddings beside the run directory."""
