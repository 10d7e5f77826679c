"""Make tables: find their cells, run what is missing, and write Markdown, CSV and pictures."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vpo_engine.reproducing.cells import Cell
from vpo_engine.reproducing.estimating import processor_seconds
from vpo_engine.reproducing.reading import base_cell
from vpo_engine.reproducing.runner import Commands, Found, Old, Runner, commands_of, look_up
from vpo_engine.reproducing.spec import Row, Table
from vpo_engine.reproducing.tables import TABLES

QUICK = "-quick"
"""What is added to the names of the files of a quick form."""
_WHOLE_SEEDS, _QUICK_SEEDS = 3, 1


@dataclass(frozen=True)
class Asked:
    """The tables and options that the command line asks for.

    seeds: None: three, or one in the quick form. steps: training steps in place of the table's, by method. write: a
    page that gets the tables between its markers. settings: of all runs, in addition.
    """

    tables: Sequence[str]
    out: Path
    jobs: int
    quick: bool = False
    seeds: int | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    old: Old = "refuse"
    write: Path | None = None
    settings: tuple[str, ...] = ()

    @property
    def seed_numbers(self) -> range:
        return range(self.seeds or (_QUICK_SEEDS if self.quick else _WHOLE_SEEDS))

    @property
    def suffix(self) -> str:
        return QUICK if self.quick else ""

    def command(self, table: str) -> str:
        """Return the command that makes one table as it is made here."""
        words = ["python -m vpo_engine.reproduce", table]
        words += ["--quick"] if self.quick else []
        words += [f"--seeds {len(self.seed_numbers)}"]
        words += (
            [f"--steps {' '.join(f'{name}={count}' for name, count in self.steps.items())}"]
            if self.steps
            else []
        )
        return " ".join(words)


def grid_of(asked: Asked) -> dict[str, dict[tuple[str, int], Cell]]:
    """Return the cells of every table: {table: {(row, seed): cell}}. ValueError if a configuration is wrong."""
    grids = {}
    for name in asked.tables:
        table = TABLES[name]
        if table.kind == "ranking":
            from vpo_engine.reproducing.scorers import cells_of as ranked

            grids[name] = {("", cell.seed): cell for cell in ranked(asked.seed_numbers, asked.quick)}
        elif table.kind == "memory":
            from vpo_engine.reproducing.memory import cells_of as planned

            grids[name] = planned(asked.quick)
        else:
            grids[name] = _runs(table, asked)
    for cell in {cell for cells in grids.values() for cell in cells.values()}:
        _check(cell)
    return grids


def _runs(table: Table, asked: Asked) -> dict[tuple[str, int], Cell]:
    from vpo_engine.reproducing.results import cells_of

    more = {row.label: (*_steps(row, asked.steps, table.length), *asked.settings) for row in table.rows}
    return cells_of(table, asked.seed_numbers, asked.quick, more)


def _steps(row: Row, steps: Mapping[str, int], length: int) -> tuple[str, ...]:
    """Return the row's settings for --steps, which are those of the usual length, in a table of ``length`` times that.

    Runs of equal samples are counted, and keep their steps.
    """
    method = dict(word.partition("=")[::2] for word in row.settings).get("method", "online_vpo")
    if method not in steps or row.budget == "equal samples":
        return ()
    count = steps[method] * length
    return f"steps={count}", f"optimizer.warmup_steps={count // 8}"


def _check(cell: Cell) -> None:
    try:
        if cell.kind != "ranking":
            cell.config()
    except ValueError as error:
        raise ValueError(f"{cell.name} cannot be run: {error}") from None


def with_bases(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells, and before each run the base policy's cell that it is compared with; each once."""
    found: dict[Cell, None] = {}
    for cell in cells:
        if cell.kind == "run":
            found[base_cell(cell)] = None
        found[cell] = None
    return list(found)


def make(
    asked: Asked,
    say: Callable[[str], None],
    commands: Callable[[Cell, Path], Commands] = commands_of,
) -> int:
    """Make the tables and return the exit code: 1 if a cell failed.

    On Ctrl-C the tables of what is finished are written, and KeyboardInterrupt goes on.
    """
    if asked.write is not None:
        _check_page(asked)
    grids = grid_of(asked)
    # Seed by seed, so that an interrupted grid has whole comparisons of its first seeds.
    cells = with_bases(sorted((c for g in grids.values() for c in g.values()), key=lambda cell: cell.seed))
    found = look_up(cells, asked.out, asked.old)
    say(describe(cells, found, asked.jobs))
    try:
        found = Runner(asked.out, asked.jobs, commands=commands, say=say).run(cells, asked.old)
    except KeyboardInterrupt:
        found = look_up(cells, asked.out, "keep" if asked.old == "keep" else "redo")
        write(asked, grids, found, say)
        raise KeyboardInterrupt(
            f"{len(found.finished)} of {len(cells)} cells are finished; the same command goes on"
        ) from None
    write(asked, grids, found, say)
    for cell, text in found.failed.items():
        say(f"failed: {cell.name}: {text}")
    return 1 if found.failed else 0


def describe(cells: Sequence[Cell], found: Found, jobs: int) -> str:
    """Say how many cells there are and about how long the missing ones take."""
    seconds = [processor_seconds(cell) for cell in found.missing]
    if not seconds:
        return f"{len(cells)} cells, all finished"
    clock = max(math.fsum(seconds) / jobs, max(seconds))
    kept = f"{len(found.finished)} finished, " if found.finished else ""
    return (
        f"{len(cells)} cells: {kept}{len(seconds)} to make, about {_duration(clock)} with {jobs} at a time on idle "
        f"cores ({_duration(math.fsum(seconds))} of processor time)"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def write(
    asked: Asked,
    grids: Mapping[str, Mapping[tuple[str, int], Cell]],
    found: Found,
    say: Callable[[str], None],
) -> None:
    """Write every table's files into the output folder, print it, and put it into the page."""
    from vpo_engine.reproducing.writing import put_between

    asked.out.mkdir(parents=True, exist_ok=True)
    for name, cells in grids.items():
        text = _written(asked, TABLES[name], cells, found)
        if any(cell in found.old for cell in with_bases(list(cells.values()))):
            text += "\n\n**Some cells were made by other code or other settings.**"
        (asked.out / f"{name}{asked.suffix}.md").write_text(
            f"# {TABLES[name].title}\n\n{text}\n", encoding="utf-8"
        )
        say(f"\n{TABLES[name].title}\n\n{text}\n")
        if asked.write is not None:
            text += _beside(asked.write, asked.out / f"{name}{asked.suffix}.png", TABLES[name])
            page = asked.write.read_text(encoding="utf-8")
            asked.write.write_text(put_between(page, name, text), encoding="utf-8")
    say(f"tables, CSV files and pictures are in {asked.out}")


def _beside(page: Path, picture: Path, table: Table) -> str:
    """Copy a table's picture beside a page, if there is one, and return the Markdown that shows it."""
    if not picture.is_file():
        return ""
    copied = page.with_name(f"miniature_{table.name}.png")
    shutil.copyfile(picture, copied)
    return f"\n\n![{table.title}]({copied.name})"


def _written(asked: Asked, table: Table, cells: Mapping[tuple[str, int], Cell], found: Found) -> str:
    """Write a table's CSV and pictures, and return it as Markdown."""
    name = f"{table.name}{asked.suffix}"
    csv, command = asked.out / f"{name}.csv", asked.command(table.name)
    if table.kind == "ranking":
        from vpo_engine.reproducing import scorers

        scorers.write_csv(csv, list(cells.values()), found.finished)
        scorers.draw(asked.out, name, list(cells.values()), found.finished)
        return scorers.markdown(table, list(cells.values()), found.finished, command)
    if table.kind == "memory":
        from vpo_engine.reproducing import memory

        memory.write_csv(csv, cells, found.finished)
        memory.draw(asked.out, name, cells, found.finished)
        return memory.markdown(table, cells, found.finished, command)
    from vpo_engine.reproducing import pictures, writing
    from vpo_engine.reproducing.results import gather

    result = gather(table, cells, found.finished)
    writing.write_csv(csv, result)
    pictures.draw(result, asked.out, name)
    return writing.markdown(result, command)


def _check_page(asked: Asked) -> None:
    """Raise ValueError, before anything runs, if the page lacks the markers of a table."""
    from vpo_engine.reproducing.writing import put_between

    assert asked.write is not None
    page = asked.write.read_text(encoding="utf-8")
    for name in asked.tables:
        put_between(page, name, "")
