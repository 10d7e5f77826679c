"""Make tables like 2, 4a and 4b of OnlineVPO (arXiv 2412.15159) on the sprites world.

    python bench/sprites_tables.py [--tables 2 4a 4b] [--jobs 2] [--seed 0] [--write docs/sprites_tables.md]

Table 2 shows how well each scorer finds the preferred one of eight clips (sprites_ranking.py). Tables 4a and 4b show
the effect of choosing pairs by another scorer, or by another of its dimensions (sprites_runs.py); each row is a
training run of about six minutes on one core. Results are kept in the folder --out and not made again. --write puts the
tables between the markers of a page, and draws the pictures beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sprites_ranking
import sprites_runs
import torch
from matplotlib.figure import Figure
from report import Table, replaced
from rows import commit, hardware

from vpo_engine.metrics.ranking import Estimate, Ranking
from vpo_engine.metrics.ranking_report import draw_ranking
from vpo_engine.metrics.summary import change

NAMES = ("2", *sprites_runs.TABLES)
TITLES = {
    "rendered": "As rendered",
    "decoded": "After the autoencoder, which all clips of a policy come out of",
}
PAPER_2 = {"ImageReward": 44.17, "VideoScore": 67.23}
"""MRR, per cent."""
COLUMNS = {
    "dynamic degree": "judge/dynamic_degree",
    "displacement, px": "pixels/displacement",
    "temporal consistency": "judge/temporal_consistency",
    "identity": "judge/factual_consistency",
    "jitter, px": "pixels/jitter",
    "colour change": "pixels/colour_change",
    "flicker": "pixels/flicker",
    "image score": "reward/image",
    "judge": "judge/selected",
}
FOR_THE_PAPERS = {
    "dynamic degree": "dynamic degree",
    "temporal consistency": "subject consistency",
    "image score": "aesthetic",
}
"""Our columns that correspond to the paper's, in the paper's order."""
PAPER_BASE = (44.0, 95.35, 52.74)
_MARKS = {"better": " ↑", "worse": " ↓", "unclear": "", "changed": ""}
Summaries = Mapping[str, Mapping[str, Any]]
"""The summaries by run: {run: summary}, as ``sprites_runs.measured`` returns them."""


def _percent(found: Estimate) -> str:
    bounds = "" if found.low is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"{100 * found.value:.1f}{bounds}"


def ranking_table(rankings: Mapping[str, Ranking]) -> Table:
    """Return a table with a line per scorer and one for chance, in per cent with 95 % intervals over groups."""
    first = next(iter(rankings.values()))
    header = ["", *(name.replace("mrr", "MRR") for name in first.measures)]
    lines = [[label, *map(_percent, each.measures.values())] for label, each in rankings.items()]
    return Table(header, [*lines, ["chance", *(f"{100 * value:.1f}" for value in first.chance.values())]], [])


def ranking_text(rankings: sprites_ranking.Rankings, settings: Mapping[str, object]) -> str:
    """Return table 2 and its conclusions as Markdown."""
    parts = [f"{settings['groups']} groups, seed {settings['seed']}; {settings['origin']}."]
    for variant, rows in rankings.items():
        image, video = (
            100 * rows[label].measures["mrr"].value
            for label in ("sprites_image (frames)", "sprites, mean of all")
        )
        parts += [
            f"{TITLES[variant]}:",
            ranking_table(rows).markdown(),
            f"The video reward's MRR is {video / image:.2f} times that of the frame-wise one; the paper's VideoScore "
            f"has {PAPER_2['VideoScore'] / PAPER_2['ImageReward']:.2f} times ImageReward's "
            f"({PAPER_2['VideoScore']} and {PAPER_2['ImageReward']}).",
        ]
    return "\n\n".join(parts)


def runs_table(rows: Sequence[sprites_runs.Row], found: Summaries) -> Table:
    """Return a table with the base policy and a line per run: final values, marked if clearly better or worse."""
    base = found[rows[0].run]["measures"]
    header = ["reward", *COLUMNS, "paper: dynamic, subject, aesthetic"]
    lines = [["base policy", *(f"{base[key]['before']:.3f}" for key in COLUMNS.values()), _paper(PAPER_BASE)]]
    for row in rows:
        measures = found[row.run]["measures"]
        cells = [
            f"{measures[key]['after']:.3f}{_MARKS[change(key, measures[key])]}" for key in COLUMNS.values()
        ]
        lines.append([row.label, *cells, _paper(row.paper)])
    return Table(header, lines, [])


def _paper(values: Sequence[float] | None) -> str:
    return "" if values is None else " ".join(f"{value:g}" for value in values)


def directions(rows: Sequence[sprites_runs.Row], found: Summaries) -> list[str]:
    """Say for each of the paper's columns which row is highest and which is lowest, here and in the paper."""
    shared = [row for row in rows if row.paper is not None]
    lines = []
    for place, (ours, theirs) in enumerate(FOR_THE_PAPERS.items()):
        here = sorted(shared, key=lambda row: found[row.run]["measures"][COLUMNS[ours]]["after"])
        there = sorted(shared, key=lambda row: (row.paper or ())[place])
        same = [here[end].run == there[end].run for end in (-1, 0)]
        verdict = {2: "as in the paper", 1: "half as in the paper", 0: "not as in the paper"}[sum(same)]
        lines.append(
            f"- {ours} is highest with *{here[-1].label}* and lowest with *{here[0].label}*; the paper's {theirs} "
            f"with *{there[-1].label}* and *{there[0].label}*: {verdict}."
        )
    return lines


def runs_text(name: str, found: Summaries) -> str:
    """Return table 4a or 4b and its conclusions as Markdown."""
    rows = sprites_runs.TABLES[name]
    shown = [found[row.run] for row in rows]
    origins = "; ".join(dict.fromkeys(summary["origin"] for summary in shown))
    return "\n\n".join(
        [
            f"{shown[0]['clips']} held-out clips; {origins}.",
            runs_table(rows, found).markdown(),
            "\n".join(directions(rows, found)),
        ]
    )


def draw_runs(path: Path, rows: Sequence[sprites_runs.Row], found: Summaries) -> None:
    """Plot consistency against dynamic degree, with a dot per run, here and in the paper."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    here, there = figure.subplots(1, 2)
    x, y = (COLUMNS[name] for name in ("dynamic degree", "temporal consistency"))
    base = found[rows[0].run]["measures"]
    ours = {"base": (base[x]["before"], base[y]["before"])}
    theirs = {"base": PAPER_BASE[:2]}
    for row in rows:
        measures = found[row.run]["measures"]
        ours[row.label] = (measures[x]["after"], measures[y]["after"])
        if row.paper is not None:
            theirs[row.label] = row.paper[:2]
    for axis, points in ((here, ours), (there, theirs)):
        for place, (label, point) in enumerate(sorted(points.items(), key=lambda named: named[1])):
            axis.plot(*point, "x" if label == "base" else "o", color="k" if label == "base" else "#4269d0")
            # Labels of neighbouring points are alternately above and below.
            axis.annotate(
                label,
                point,
                (0, -13 if place % 2 else 6),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
    here.set(title="sprites, by the judge", xlabel="dynamic degree", ylabel="temporal consistency")
    there.set(title="the paper, VBench", xlabel="dynamic degree, %", ylabel="subject consistency, %")
    for axis in (here, there):
        axis.margins(x=0.35, y=0.15)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def make(given: argparse.Namespace) -> dict[str, str]:
    """Make the chosen tables: {table: Markdown}; if a page is written, also draw their pictures beside it."""
    origin = f"{hardware(torch.device('cpu'))}, torch {torch.__version__}, commit {commit()}"
    texts: dict[str, str] = {}
    if "2" in given.tables:
        rankings, settings = sprites_ranking.make_rankings(given.out, given.groups, given.seed, origin)
        texts["2"] = ranking_text(rankings, settings)
        if given.write is not None:
            title = f"The least damaged of eight clips, {settings['groups']} groups, after the autoencoder"
            draw_ranking(given.write.with_name("sprites_table2.png"), rankings["decoded"], title)
    tables = {name: sprites_runs.TABLES[name] for name in given.tables if name != "2"}
    runs = list(dict.fromkeys(row.run for rows in tables.values() for row in rows))
    if runs:
        out = given.out / f"runs_{given.seed}_{given.steps or 'default'}"
        sprites_runs.train(runs, out, given.seed, given.steps, given.jobs)
        found = sprites_runs.measured(runs, out, origin)
        texts |= {name: runs_text(name, found) for name in tables}
        if given.write is not None and "4b" in tables:
            draw_runs(given.write.with_name("sprites_table4b.png"), tables["4b"], found)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", nargs="+", choices=NAMES, default=list(NAMES), help="tables to make (default: all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of runs at a time, with one thread each (default: 2)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the groups and of every run (default: 0)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: those of configs/sprites.yaml)")
    parser.add_argument(
        "--groups", type=int, default=sprites_ranking.GROUPS, help="groups of table 2 (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/sprites_tables"),
        help="folder for results (default: %(default)s)",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the tables between the page's markers"
    )
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        texts = make(given)
        for name, text in texts.items():
            print(f"Table {name}\n\n{text}\n")
        if given.write is not None:
            page = given.write.read_text(encoding="utf-8")
            for name, text in texts.items():
                page = replaced(
                    page, f"{text}\n", f"<!-- table {name} -->\n", f"<!-- end of table {name} -->"
                )
            given.write.write_text(page, encoding="utf-8")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
