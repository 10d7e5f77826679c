"""The table of ``check_model``: its rows, the order of the checks, and what each needs to be right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.registry import model_family


@dataclass(frozen=True)
class Finding:
    """The result of a check. error: of at most ``limit``. note: what differs, for people."""

    error: float
    limit: float
    note: str


@dataclass(frozen=True)
class Row:
    """A line of the table. entry: the part of the family's description that is wrong if ``ok`` is False.

    ok: None where the check was not made, because a check that it needs has failed.
    """

    name: str
    entry: str
    ok: bool | None
    error: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.ok is None:
            return f"not checked ({self.note})"
        return "ok" if self.ok else f"WRONG: {self.entry}"


@dataclass
class Table:
    """The rows so far."""

    rows: list[Row] = field(default_factory=list)

    def check(self, name: str, entry: str, find: Callable[[], Finding], needs: Sequence[str] = ()) -> None:
        """Add the row of a check, unless one that it needs has failed or was not made.

        What the check raises is its finding: a wrong description makes networks and pipelines fail.
        """
        right = {row.name for row in self.rows if row.ok}
        missing = [need for need in needs if need not in right]
        if missing:
            self.rows.append(Row(name, entry, None, note=f"needs: {missing[0]}"))
            return
        try:
            found = find()
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError, AssertionError, OSError) as error:
            text = str(error).strip().partition("\n")[0]
            self.rows.append(Row(name, entry, False, note=f"{type(error).__name__}: {text}"))
            return
        ok = found.error <= found.limit  # not so for nan
        self.rows.append(Row(name, entry, ok, found.error, found.limit, found.note))


def all_rows(config: Config, folder: Path) -> list[Row]:
    """Check a folder against the description of its family; see ``vpo_engine.check_model``."""
    from vpo_engine.model_checks.own import own_checks

    table, family = Table(), model_family(config.model.kind)
    if family.card.pipelines:
        from vpo_engine.model_checks.pipeline import class_checks, pipeline_checks

        class_checks(table, family, folder)
        if not all(row.ok for row in table.rows):
            return table.rows
    model = build_model(config, Processes.start(config.model.device), say=lambda line: None)
    if family.card.pipelines:
        pipeline_checks(table, model, config, folder)
    own_checks(table, model)
    return table.rows
