"""Write a table for people: as Markdown, as CSV, and between the markers of a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from vpo_engine.reproducing.cells import Record
from vpo_engine.reproducing.results import RowResult, TableResult, column_title, format_interval
from vpo_engine.reproducing.spec import BASE, Column
from vpo_engine.texts import code_span
from vpo_engine.texts import markdown as markdown_text

_CSV = ("table", "row", "measure", "stands_for", "seeds", "clips", "value", "change", "half_width", "paper")


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def markdown(found: TableResult, command: str) -> str:
    """Return a table, its claims and where its numbers come from as Markdown; ``command``: what makes it."""
    table = found.table
    parts = [table.about]
    if found.missing:
        total = len(found.missing) + len(found.records)
        parts.append(
            f"**Partial: {len(found.missing)} of {total} runs are missing** ({'; '.join(found.missing)})."
        )
    if found.rows:
        parts += [_numbers(found), _budgets(found)]
    if found.judged:
        lines = [[one.said, one.here, f"**{one.verdict}**"] for one in found.judged]
        parts.append(grid(["the paper says", "here", ""], lines))
    if table.cannot:
        parts.append(table.cannot)
    parts.append(
        origin([ran.record for ran in found.records], command, f"{found.clips} held-out clips for each seed")
    )
    return "\n\n".join(parts)


def _numbers(found: TableResult) -> str:
    """Return the table of measures: value, and change from the base policy with its interval."""
    columns = found.table.columns
    papers = list(dict.fromkeys(key for row in found.rows for key in row.row.paper))
    header = ["", *map(column_title, columns), *(f"paper: {name}" for name in papers)]
    lines = [
        [
            row.row.label,
            *(_cell(row, column) for column in columns),
            *(_plain(row.row.paper.get(name)) for name in papers),
        ]
        for row in found.rows
    ]
    return grid(header, lines)


def _cell(row: RowResult, column: Column) -> str:
    value = row.values[column.measure]
    shown = f"{value:.{2 if abs(value) >= 1 else 3}f}"
    change = row.changes.get(column.measure)
    if change is None:
        return shown
    mark = "**" if change.sign else ""
    return f"{shown} ({mark}{format_interval(change)}{mark})"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _budgets(found: TableResult) -> str:
    """Return what each row took, as a sentence for each."""
    lines = []
    for row in found.rows:
        if row.seconds is None or row.videos is None:
            continue
        raised = {kind for kinds in (row.alarms or {}).values() for kind in kinds}
        lines.append(
            [
                row.row.label,
                row.row.budget,
                f"{row.videos:.0f}",
                f"{row.seconds:.0f}",
                ", ".join(map(str, row.seeds)),
                markdown_text(", ".join(sorted(raised))) or "none",
            ]
        )
    header = ["", "budget", "videos scored", "processor seconds of training", "seeds", "alarms"]
    return grid(header, lines)


def origin(records: Sequence[Record], command: str, size: str) -> str:
    """Return where numbers come from: the command, how much was compared, the machines and the versions of the code."""
    if not records:
        return f"{code_span(command)}; nothing of it has been run yet."
    machines, commits, codes = (
        dict.fromkeys(markdown_text(getattr(record, name)) for record in records)
        for name in ("machine", "commit", "code")
    )
    mixed = f" (**{len(codes)} versions of the code**)" if len(codes) > 1 else ""
    return f"{code_span(command)}; {size}; {'; '.join(machines)}; commit {', '.join(commits)}{mixed}."


def write_csv(path: Path, found: TableResult) -> None:
    """Write a line for each row and measure; ``half_width`` is that of the change's 95 % interval."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CSV)
        for row in found.rows:
            for column in found.table.columns:
                change = row.changes.get(column.measure)
                paper = row.row.paper.get(column.paper) if column.paper else None
                writer.writerow(
                    [
                        found.table.name,
                        row.row.label,
                        column.measure,
                        column.paper or "",
                        len(row.seeds),
                        found.clips * len(row.seeds),
                        repr(row.values[column.measure]),
                        "" if change is None else repr(change.mean),
                        "" if change is None or change.half is None else repr(change.half),
                        "" if paper is None else repr(paper),
                    ]
                )


def put_between(page: str, name: str, text: str) -> str:
    """Return ``page`` with ``text`` between the markers of ``name``. ValueError unless it has one pair of them."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, start, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not start or not end or first in tail:
        raise ValueError(
            f"the page must hold one line {first.strip()!r} and, after it, one {last!r}; add them"
        )
    return f"{head}{start}\n{text}\n\n{end}{tail}"


def is_base(row: RowResult) -> bool:
    """Return whether a row is the base policy's."""
    return row.row.label == BASE
