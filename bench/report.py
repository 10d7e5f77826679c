"""Format recorded measurements as tables, for the end of a benchmark run and for documents.

``python bench/report.py`` prints all recorded rows as markdown; ``python bench/report.py docs/benchmarks.md`` puts them
between that page's markers, ``<!-- rows -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import Environment, Row, read

LABELS = {"seconds": "median", "low_seconds": "20 %", "high_seconds": "80 %"}
_MOST_COLUMNS = 24
"""Most columns that a page shows side by side."""
START, END = "<!-- rows -->\n", "<!-- end -->"


@dataclass(frozen=True)
class Table:
    """A table of text cells. ``groups`` are the numbers of the rows before which ``text`` leaves an empty line."""

    header: list[str]
    lines: list[list[str]]
    groups: list[int]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.lines, strict=True)]

        def align(line: list[str]) -> str:
            return "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

        out = [align(self.header)]
        for number, line in enumerate(self.lines):
            out += ["", align(line)] if number in self.groups else [align(line)]
        return "\n".join(out)

    def markdown(self) -> str:
        rule = ["---"] * len(self.header)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def duration(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


def size(count: float) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{_digits(count / 1024**power)} {unit}"
    return f"{count:.0f} B"


def cell(name: str, value: float | None) -> str:
    """Format a number of a row in the unit with which its name ends."""
    if value is None:
        return ""
    for unit, show in (
        ("bytes_per_second", lambda v: f"{_digits(v / 1e9)} GB/s"),
        ("seconds", duration),
        ("bytes", size),
    ):
        if name.endswith(unit):
            return show(value)
    return f"{value:.4g}"


def _loss_line(row: Row, others: dict[str, Row]) -> list[str]:
    """Return the line of a row. ``others``: rows of the same case by implementation."""
    numbers = row.numbers

    def times(name: str) -> str:
        return f"{others[name].numbers['seconds'] / numbers['seconds']:.2f}x" if name in others else ""

    def shown(name: str) -> str:
        return cell(name, numbers.get(name))

    return [
        row.case["shape"],
        row.case["dtypes"],
        row.case["pass"],
        row.case["implementation"],
        shown("seconds"),
        f"{shown('low_seconds')} - {shown('high_seconds')}",
        times("eager"),
        times("compile"),
        shown("peak_bytes"),
        shown("kernels" if "kernels" in numbers else "operators"),
        _digits(numbers["bytes_per_second"] / 1e9),
        f"{numbers['bytes_per_second'] / numbers['copy_bytes_per_second']:.0%}",
        shown("host_seconds"),
        shown("compile_seconds"),
    ]


def loss_table(rows: Sequence[Row]) -> Table:
    """Return a table with the speed relative to eager and compiled torch, and the rate relative to a plain copy."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        case = row.case["shape"], row.case["dtypes"], row.case["pass"]
        cases.setdefault(case, {})[row.case["implementation"]] = row
    lines: list[list[str]] = []
    groups: list[int] = []
    for others in cases.values():
        groups.append(len(lines))
        lines += [_loss_line(row, others) for row in others.values()]
    counted = "kernels" if any("kernels" in row.numbers for row in rows) else "operators"
    header = ["shape", "dtypes", "pass", "implementation", "median", "20 - 80 %", "vs eager", "vs compile"]
    header += ["peak", counted, "GB/s", "of copy", "from idle", "compile"]
    return _without_empty_columns(Table(header, lines, groups[1:]))


def _without_empty_columns(table: Table) -> Table:
    keep = [index for index in range(len(table.header)) if any(line[index] for line in table.lines)]

    def pick(line: list[str]) -> list[str]:
        return [line[index] for index in keep]

    return Table(pick(table.header), [pick(line) for line in table.lines], table.groups)


def plain_table(rows: Sequence[Row]) -> Table:
    """Return a table with a column for every part of the case and for every number."""
    cases = list(dict.fromkeys(name for row in rows for name in row.case))
    numbers = list(dict.fromkeys(name for row in rows for name in row.numbers))
    lines = [
        [
            *(row.case.get(name, "") for name in cases),
            *(cell(name, row.numbers.get(name)) for name in numbers),
        ]
        for row in rows
    ]
    names = (LABELS.get(name, name.removesuffix("_seconds").replace("_", " ")) for name in numbers)
    return Table([*cases, *names], lines, [])


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {"loss": loss_table}
"""Topics that have a special table; the others have ``plain_table``."""


def table(topic: str, rows: Sequence[Row]) -> Table:
    """Return the table of a topic's rows. If it would be too wide to read, each number has a line of its own."""
    found = TABLES.get(topic, plain_table)(rows)
    return _turned(found) if len(found.header) > _MOST_COLUMNS else found


def _turned(table: Table) -> Table:
    header, *lines = (list(line) for line in zip(table.header, *table.lines, strict=True))
    return Table(header, lines, [])


def by_environment(rows: Sequence[Row]) -> dict[Environment, list[Row]]:
    """Group rows that were measured together: with the same machine, versions, commit, command and date."""
    groups: dict[Environment, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.environment, []).append(row)
    return groups


def provenance(origin: Environment) -> str:
    return (
        f"{origin.hardware}, {origin.threads} threads; torch {origin.torch}, triton {origin.triton}, "
        f"Python {origin.python}; commit {origin.commit}, {origin.date}: `{origin.command}`"
    )


def markdown(topics: dict[str, list[Row]]) -> str:
    """Format all recorded rows: a section for each topic, with a table for each machine and run."""
    parts = []
    for topic, rows in topics.items():
        parts.append(f"## {topic}")
        for origin, measured in by_environment(rows).items():
            parts += [provenance(origin), table(topic, measured).markdown()]
    return "\n\n".join(parts) + "\n" if parts else "No rows are recorded yet.\n"


def replace_rows(page: str, rows: str) -> str:
    """Return the page with ``rows`` between its markers. Raise ValueError unless it has one pair of them, in order."""
    return replaced(page, rows, START, END)


def replaced(page: str, text: str, first: str, last: str) -> str:
    """Return the page with ``text`` between two markers. Raise ValueError unless it has one pair of them, in order."""
    head, start, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not start or not end or first in tail:
        raise ValueError(
            f"the page must hold one line {first.strip()!r} and, after it, one {last!r}; add them"
        )
    return f"{head}{start}\n{text}\n{end}{tail}"


def main(arguments: Sequence[str]) -> int:
    rows = markdown(read())
    if not arguments:
        print(rows, end="")
        return 0
    page = Path(arguments[0])
    page.write_text(replace_rows(page.read_text(), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
