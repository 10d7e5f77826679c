"""Scores of videos as a table and a CSV file; rankings by several of them side by side, and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vpo_engine.metrics.ranking import Estimate, Ranking
from vpo_engine.texts import counted

Scores = dict[tuple[str, str], dict[str, float]]
"""{(name of a video, its prompt): {dimension: score}}, all with the same dimensions."""
_BAR, _CHANCE = "#4269d0", "#b3261e"


def format_ranking(rankings: Mapping[str, Ranking], confidence: float = 0.95) -> str:
    """Format one line per score and one for chance; in per cent, with confidence intervals in brackets."""
    _check(rankings)
    first = next(iter(rankings.values()))
    rows = [("", *(_heading(name) for name in first.measures))]
    rows += [(label, *(_cell(value) for value in each.measures.values())) for label, each in rankings.items()]
    rows += [("chance", *(f"{100 * value:.2f}" for value in first.chance.values()))]
    note = (
        f"{counted(first.prompts, 'prompt')}; per cent, in brackets {confidence:.0%} confidence over prompts"
    )
    return "\n".join([*_align(rows), "", note])


def write_ranking_csv(path: Path, rankings: Mapping[str, Ranking]) -> None:
    """Write rows of score, measure, value, low, high, chance, prompts.

    Values are shares of 1; bounds are empty with a single prompt.
    """
    _check(rankings)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("score", "measure", "value", "low", "high", "chance", "prompts"))
        for label, ranking in rankings.items():
            for name, found in ranking.measures.items():
                row = (found.value, found.low, found.high, ranking.chance[name])
                writer.writerow(
                    (label, name, *("" if cell is None else repr(cell) for cell in row), ranking.prompts)
                )


def draw_ranking(path: Path, rankings: Mapping[str, Ranking], title: str) -> None:
    """Draw a PNG with a panel per measure: a bar and an interval per score, a dashed line for chance."""
    _check(rankings)
    first = next(iter(rankings.values()))
    labels, places = list(rankings), range(len(rankings))
    figure = Figure(figsize=(2.6 * len(first.measures) + 1.6, 0.42 * len(labels) + 1.7), layout="constrained")
    panels = figure.subplots(1, len(first.measures), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, first.measures, strict=True):
        for place, ranking in zip(places, rankings.values(), strict=True):
            found = ranking.measures[name]
            panel.barh(place, 100 * found.value, height=0.6, color=_BAR)
            edge = found.value
            if found.low is not None and found.high is not None:
                panel.plot((100 * found.low, 100 * found.high), (place, place), color="black", linewidth=1.2)
                edge = found.high
            panel.text(100 * edge + 2, place, f"{100 * found.value:.1f}", va="center", fontsize=8)
        panel.axvline(100 * first.chance[name], color=_CHANCE, linestyle="--", linewidth=1)
        panel.set_title(_heading(name), fontsize=10)
        panel.set_xlim(0, 119)
        panel.set_xticks((0, 25, 50, 75, 100))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(list(places), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("per cent; black: 95 % confidence over prompts; dashed: chance", fontsize=8)
    figure.savefig(path, dpi=150)


def format_scores(scores: Scores) -> str:
    """Format a table of videos and dimensions, with the mean over videos below."""
    dimensions = list(next(iter(scores.values())))
    rows = [("", *dimensions)]
    rows += [(name, *(f"{row[key]:.4f}" for key in dimensions)) for (name, _), row in scores.items()]
    means = [sum(row[key] for row in scores.values()) / len(scores) for key in dimensions]
    rows += [(f"mean of {counted(len(scores), 'video')}", *(f"{mean:.4f}" for mean in means))]
    return "\n".join(_align(rows))


def write_scores_csv(path: Path, scores: Scores) -> None:
    """Write a CSV file of video, prompt and the dimensions, exact to the last bit."""
    dimensions = list(next(iter(scores.values())))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("video", "prompt", *dimensions))
        for (name, prompt), row in scores.items():
            writer.writerow((name, prompt, *(repr(row[key]) for key in dimensions)))


def _heading(measure: str) -> str:
    """Write ``mrr`` as ``MRR``, and recalls as they are."""
    return measure.upper() if measure == "mrr" else measure


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format the lines of a table: the first column is aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _cell(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:.2f}"
    return f"{100 * found.value:.2f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _check(rankings: Mapping[str, Ranking]) -> None:
    assert rankings
    first = next(iter(rankings.values()))
    assert all(each.measures.keys() == first.measures.keys() for each in rankings.values())
    assert all((each.prompts, each.chance) == (first.prompts, first.chance) for each in rankings.values())
