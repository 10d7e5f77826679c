"""The description of a table: rows of training runs, measures, and what the paper says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

BASE = "base policy"
"""The row of the policy that every run starts from; it is measured, and not trained."""


@dataclass(frozen=True)
class Column:
    """A measure that a table shows.

    measure: its name, one of ``measuring.MEASURES``. paper: the column of the paper that it stands for; None if the
    paper has none.
    """

    label: str
    measure: str
    paper: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: a run of ``vpo_engine.train`` by its settings in addition to those of the table.

    paper: the paper's numbers by its own columns. budget: in what the run equals OnlineVPO's, for methods whose steps
    are of another kind. quick: its settings in the quick form, after the row's own; None: those of the table.
    """

    label: str
    settings: tuple[str, ...] = ()
    paper: Mapping[str, float] = field(default_factory=dict)
    budget: str = ""
    quick: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Claim:
    """Something that the paper says: by ``measure``, each row of ``more`` is above each row of ``less``.

    said: the claim as a sentence, with the paper's numbers.
    """

    said: str
    measure: str
    more: tuple[str, ...]
    less: tuple[str, ...]


@dataclass(frozen=True)
class CurveClaim:
    """Something that the paper says about the course of one row: a held-out number rises and then falls, or not."""

    said: str
    measure: str
    row: str
    falls: bool = True


@dataclass(frozen=True)
class AlarmClaim:
    """Guards raise an alarm on this row's runs if they collapse, and on no others (docs/guards.md)."""

    said: str
    row: str


@dataclass(frozen=True)
class Curve:
    """A number that is drawn against the steps of a run: a key of the rows that evaluations log."""

    label: str
    key: str


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper, on the sprites world.

    settings: of all its rows, in addition to those of configs/sprites_fast.yaml. quick: of its quick form, in addition.
    kind: the work that makes it. curves: what is drawn against training; without them the picture shows the columns.
    about: what the table shows and how, in a sentence or two. cannot: what this world cannot show of it, and why.
    """

    name: str
    title: str
    about: str
    kind: Literal["runs", "ranking", "memory"] = "runs"
    rows: Sequence[Row] = ()
    columns: Sequence[Column] = ()
    claims: Sequence[Claim | CurveClaim | AlarmClaim] = ()
    settings: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    curves: Sequence[Curve] = ()
    cannot: str = ""
    length: int = 1
    """Length of its runs, in usual ones."""

    def row(self, label: str) -> Row:
        """Return the row with this label."""
        return next(row for row in self.rows if row.label == label)
