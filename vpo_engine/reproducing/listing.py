"""The text of ``reproduce --list``: every table with its runs and the time that it takes."""

from __future__ import annotations

import math
from dataclasses import replace

from vpo_engine.reproducing.estimating import processor_seconds
from vpo_engine.reproducing.making import Asked, grid_of, with_bases
from vpo_engine.reproducing.tables import TABLES


def listing(asked: Asked) -> str:
    """Return a line for each table and one for all of them, which share cells."""
    rows = []
    for name in asked.tables:
        rows.append((name, *_numbers(replace(asked, tables=[name])), TABLES[name].title.partition(": ")[2]))
    if len(rows) > 1:
        rows.append(("together", *_numbers(asked), "cells that tables share are made once"))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(
        f"{name:<{width}}  {cells:>4} cells  {minutes:>5} min with {asked.jobs} at a time  {title}"
        for name, cells, minutes, title in rows
    )


def _numbers(asked: Asked) -> tuple[int, int]:
    cells = with_bases([cell for grid in grid_of(asked).values() for cell in grid.values()])
    seconds = math.fsum(map(processor_seconds, cells)) / asked.jobs
    return len(cells), max(1, round(seconds / 60))
