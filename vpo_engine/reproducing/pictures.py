"""Draw tables as PNG and SVG: changes with their intervals beside the paper's numbers, and curves over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpo_engine.reproducing.results import TableResult, column_title
from vpo_engine.reproducing.spec import BASE, Column, Curve
from vpo_engine.reproducing.writing import is_base

OURS, PAPER, NEUTRAL = "#3257a8", "#b3541e", "#777777"
_LINES = ("#3257a8", "#b3541e", "#3a8f5c", "#7a4fa3", "#8a8a2a", "#444444", "#c23b6b")
_FORMATS = ("png", "svg")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure in all formats; SVG without dates, so that equal pictures are equal files."""
    paths = [folder / f"{name}.{kind}" for kind in _FORMATS]
    figure.savefig(paths[0], dpi=130)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw(found: TableResult, folder: Path, name: str) -> list[Path]:
    """Draw a table's picture into ``folder`` and return its files; none if there is nothing to draw."""
    if not found.rows:
        return []
    figure = draw_curves(found) if found.table.curves else draw_changes(found)
    return save(figure, folder, name)


def draw_changes(found: TableResult) -> Figure:
    """Draw a panel for each column: the change from the base policy with its interval, a line for each row.

    Below those columns that stand for one of the paper there is a panel with the paper's values.
    """
    columns = found.table.columns
    rows = [row for row in found.rows if not is_base(row)]
    labels = [row.row.label for row in rows]
    with_paper = any(
        column.paper and any(column.paper in row.row.paper for row in rows) for column in columns
    )
    height = 0.36 * len(rows) + 1.1
    figure = Figure(
        figsize=(1.9 * len(columns) + 2.4, height * (2 if with_paper else 1) + 0.5), layout="constrained"
    )
    panels = figure.subplots(2 if with_paper else 1, len(columns), squeeze=False, sharey="row")
    for panel, column in zip(panels[0], columns, strict=True):
        for place, row in enumerate(rows):
            change = row.changes[column.measure]
            panel.errorbar(
                change.mean,
                place,
                xerr=change.half,
                fmt="o",
                color=OURS,
                markersize=4.5,
                capsize=2.5,
                linewidth=1.2,
            )
        panel.axvline(0, color=NEUTRAL, linewidth=0.9)
        panel.set_title(column_title(column), fontsize=9)
    if with_paper:
        for panel, column in zip(panels[1], columns, strict=True):
            _draw_paper(panel, found, column, labels)
    for line in panels:
        for panel in line:
            panel.tick_params(labelsize=8)
            panel.margins(x=0.15)
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.set_ylim(len(rows) - 0.5, -0.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="x", alpha=0.25)
        line[0].set_yticks(range(len(rows)), labels, fontsize=8.5)
    below = "; below, the paper's values (dashed: its base model)" if with_paper else ""
    figure.suptitle(f"{found.table.title}", fontsize=11)
    figure.supxlabel(
        f"change from the base policy with 95 % intervals over seeds and clips{below}", fontsize=8
    )
    return figure


def _draw_paper(panel: Any, found: TableResult, column: Column, labels: Sequence[str]) -> None:
    values = {row.row.label: row.row.paper.get(column.paper) for row in found.rows if column.paper}
    shown = {label: value for label, value in values.items() if value is not None}
    if not any(label in shown for label in labels):
        panel.set_axis_off()
        return
    for place, label in enumerate(labels):
        if label in shown:
            panel.plot(shown[label], place, "s", color=PAPER, markersize=4.5)
    if BASE in shown:
        panel.axvline(shown[BASE], color=NEUTRAL, linewidth=0.9, linestyle="--")
    panel.set_title(f"paper: {column.paper}", fontsize=9)


def draw_curves(found: TableResult) -> Figure:
    """Draw a panel for each curve: a line for each row against the length of its training; dotted lines are alarms.

    Lines are means over seeds; bands reach from the lowest to the highest seed.
    """
    curves = found.table.curves
    figure = Figure(figsize=(3.6 * len(curves) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        for number, row in enumerate(one for one in found.rows if not is_base(one)):
            colour = _LINES[number % len(_LINES)]
            _draw_curve(panel, curve, found, row.row.label, colour)
        panel.set_title(curve.label, fontsize=9.5)
        panel.set_xlabel("training, 1 = the usual length", fontsize=8.5)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    figure.suptitle(found.table.title, fontsize=11)
    return figure


def _draw_curve(panel: Any, curve: Curve, found: TableResult, label: str, colour: str) -> None:
    runs, length = found.runs[label], found.table.length
    lines = []
    for ran in runs.values():
        points = [(row["step"], row[curve.key]) for row in ran.curve if curve.key in row]
        last = points[-1][0] or 1
        lines.append([(length * step / last, value) for step, value in points])
        for alarm in ran.alarms:
            panel.axvline(length * alarm["step"] / last, color=colour, linewidth=0.9, linestyle=":")
    shared = min(map(len, lines))
    places = [place for place, _ in lines[0][:shared]]
    values = [[line[number][1] for line in lines] for number in range(shared)]
    means = [sum(each) / len(each) for each in values]
    panel.plot(places, means, "-o", color=colour, markersize=3, linewidth=1.3, label=label)
    if len(lines) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        panel.fill_between(places, low, high, color=colour, alpha=0.15)
