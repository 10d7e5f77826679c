"""Table 2: how its numbers are put together from the scores of finished cells, and its files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpo_engine.metrics.ranking import Estimate, Ranking, rank_preferences, ranks
from vpo_engine.metrics.ranking_report import draw_ranking
from vpo_engine.reproducing.cells import Cell, Record, read_result
from vpo_engine.reproducing.ranking import ROWS, VARIANTS
from vpo_engine.reproducing.results import Judged, format_interval
from vpo_engine.reproducing.spec import Table
from vpo_engine.reproducing.statistics import interval, verdict
from vpo_engine.reproducing.writing import grid, origin

_VIDEO, _IMAGE, _BRISQUE = "sprites, mean of all", "sprites_image (frames)", "BRISQUE (builtin, frames)"
PAPER = {
    _BRISQUE: ("aesthetic", 42.73, 12.45, 26.24, 77.37),
    _IMAGE: ("ImageReward", 44.17, 14.25, 27.44, 78.69),
    _VIDEO: ("VideoScore", 67.23, 41.38, 62.74, 92.66),
}
"""The paper's scorers whose places ours take, with their MRR and recall@1, @2 and @4 in per cent."""
_CLAIMS = (
    (f"VideoScore ranks better than ImageReward (MRR {PAPER[_VIDEO][1]} against {PAPER[_IMAGE][1]})", _IMAGE),
    (
        f"VideoScore ranks better than LAION's aesthetic score ({PAPER[_VIDEO][1]} against {PAPER[_BRISQUE][1]})",
        _BRISQUE,
    ),
)
_Scored = dict[str, dict[int, tuple[list[list[float]], list[int]]]]
"""Scores and preferences of each label and seed."""


def cells_of(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """Return the cells of the table."""
    return [Cell("ranking", ("groups=16" if quick else "groups=48",), seed) for seed in seeds]


def _read(cells: Sequence[Cell], finished: Mapping[Cell, Path], variant: str) -> _Scored:
    found: _Scored = {label: {} for label in ROWS}
    for cell in cells:
        if cell in finished:
            result = read_result(finished[cell])[variant]
            for label, scores in result["scores"].items():
                found[label][cell.seed] = (scores, result["preferred"])
    return found


def rankings(scored: _Scored) -> dict[str, Ranking]:
    """Return the ranking of every scorer over the groups of all seeds together."""
    return {
        label: rank_preferences(
            [row for scores, _ in by_seed.values() for row in scores],
            [one for _, preferred in by_seed.values() for one in preferred],
        )
        for label, by_seed in scored.items()
        if by_seed
    }


def judge(scored: _Scored) -> list[Judged]:
    """Compare the reciprocal ranks of the video reward with those of others, group by group."""
    reciprocal = {
        label: {seed: (100 / ranks(*given)).tolist() for seed, given in by_seed.items()}
        for label, by_seed in scored.items()
    }
    found = []
    for said, other in _CLAIMS:
        difference = {
            seed: [one - two for one, two in zip(row, reciprocal[other][seed], strict=True)]
            for seed, row in reciprocal[_VIDEO].items()
        }
        here = f"{_VIDEO} - {other}: {format_interval(interval(difference), 1)}" if difference else "not run"
        found.append(Judged(said, here, verdict([difference])))
    return found


def markdown(table: Table, cells: Sequence[Cell], finished: Mapping[Cell, Path], command: str) -> str:
    """Return the table of every variant and the claims as Markdown; ``command``: what makes it."""
    done = [cell for cell in cells if cell in finished]
    records = [record for cell in done if (record := Record.read(finished[cell]))]
    parts = [table.about]
    if len(done) < len(cells):
        lost = ", ".join(str(cell.seed) for cell in cells if cell not in finished)
        parts.append(
            f"**Partial: {len(cells) - len(done)} of {len(cells)} seeds are missing** (seed {lost})."
        )
    for variant, meaning in VARIANTS.items() if done else ():
        scored = _read(cells, finished, variant)
        rows = rankings(scored)
        groups = next(iter(rows.values())).prompts
        parts += [
            f"{groups} groups, seeds {', '.join(str(cell.seed) for cell in done)}, {meaning}:",
            _table(rows),
        ]
        lines = [[one.said, one.here, f"**{one.verdict}**"] for one in judge(scored)]
        parts.append(grid(["the paper says", "here, MRR", ""], lines))
    parts.append(origin(records, command, f"{len(records)} times {_groups(cells)} groups"))
    return "\n\n".join(parts)


def _groups(cells: Sequence[Cell]) -> str:
    return cells[0].values()["groups"]


def _table(rows: Mapping[str, Ranking]) -> str:
    first = next(iter(rows.values()))
    header = ["", *(name.replace("mrr", "MRR") for name in first.measures), "paper"]
    lines = [[label, *map(_percent, each.measures.values()), _paper(label)] for label, each in rows.items()]
    lines.append(["chance", *(f"{100 * value:.1f}" for value in first.chance.values()), ""])
    return grid(header, lines)


def _paper(label: str) -> str:
    if label not in PAPER:
        return ""
    name, *numbers = PAPER[label]
    return f"{name}: {' '.join(f'{number:g}' for number in numbers)}"


def _percent(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def write_csv(path: Path, cells: Sequence[Cell], finished: Mapping[Cell, Path]) -> None:
    """Write a line for each variant, scorer and measure, in per cent."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ("table", "variant", "scorer", "measure", "groups", "value", "low", "high", "chance", "paper")
        )
        for variant in VARIANTS:
            for label, ranking in rankings(_read(cells, finished, variant)).items():
                papers = PAPER[label][1:] if label in PAPER else ("",) * len(ranking.measures)
                for (name, found), paper in zip(ranking.measures.items(), papers, strict=True):
                    bounds = (found.value, found.low, found.high, ranking.chance[name])
                    numbers = ["" if value is None else repr(100 * value) for value in bounds]
                    writer.writerow(("table2", variant, label, name, ranking.prompts, *numbers, paper))


def draw(folder: Path, name: str, cells: Sequence[Cell], finished: Mapping[Cell, Path]) -> list[Path]:
    """Draw the ranking after the autoencoder as PNG and SVG; nothing without a finished cell."""
    rows = rankings(_read(cells, finished, "decoded"))
    if not rows:
        return []
    groups = next(iter(rows.values())).prompts
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        draw_ranking(path, rows, f"The least damaged of eight clips, {groups} groups, after the autoencoder")
    return paths
