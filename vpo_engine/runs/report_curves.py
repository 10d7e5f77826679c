"""The report's section of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from vpo_engine.metrics.measures import describe
from vpo_engine.runs.charts import Chart, Point, Series, line_chart
from vpo_engine.runs.report_html import missing
from vpo_engine.runs.report_rows import MetricRows

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
_MOST_SERIES = 6
_LEAST_BASE = 1e-12


def chart_section(rows: MetricRows) -> str:
    if not rows:
        return missing("Curves", "No metrics were logged yet.")
    topics = (
        ("Results", _outcome_charts(rows)),
        ("Training", _learning_charts(rows)),
        ("Health of the run", _health_charts(rows)),
    )
    body = ""
    for title, charts in topics:
        drawn = "".join(line_chart(chart) for chart in charts)
        if drawn:
            body += f'<p class="topic">{title}</p><div class="charts">{drawn}</div>'
    marks = " Dotted vertical lines mark refreshes of the reference." if rows.refreshes() else ""
    single = "single steps" if rows.share == 1 else f"means of {rows.share} steps"
    lead = (
        f"The horizontal axis is the training step. Thin lines are {single}, thick ones running means.{marks}"
    )
    hint = (
        '<span class="scripted" hidden> To see the values of a step, point at it or touch it in a chart; on a '
        "keyboard, go to the chart with the tab key and along it with the arrow keys.</span>"
    )
    return f'<section><h2>Curves</h2><p class="soft">{lead}{hint}</p>{body}</section>'


def _outcome_charts(rows: MetricRows) -> list[Chart]:
    dimensions = [d for d in DIMENSIONS if rows.points("eval", f"held_out/reward/{d}")]
    changes = [
        Series(
            describe(f"reward/{name}").label.lower(),
            _minus_first(rows.points("eval", f"held_out/reward/{name}")),
            index,
        )
        for index, name in enumerate(dimensions, start=1)
    ]
    pixels = rows.names("eval", "held_out/pixels/")
    damage = [name for name in pixels if describe(f"pixels/{name}").better < 0]
    return [
        Chart(
            "Reward",
            [
                Series("training candidates", rows.points("train", "reward/selected"), 6, noisy=True),
                Series("held out", rows.points("eval", "held_out/reward/selected"), 1),
                Series("judge, held out", rows.points("eval", "held_out/judge/selected"), 2),
            ],
            note="The judge is never trained against. It should rise with the reward.",
        ),
        Chart(
            "Reward by dimension",
            changes,
            note="Change of the score since the start, on held-out prompts.",
            baseline=(0.0, "start"),
        ),
        Chart(
            "Damage",
            _relative(rows, damage),
            note="Pixel measures of held-out clips, relative to the start. Lower is better.",
            baseline=(1.0, "start"),
            percent=True,
        ),
        Chart(
            "Motion and detail",
            _relative(rows, [name for name in pixels if name not in damage]),
            note="Less motion is a common side effect.",
            baseline=(1.0, "start"),
            percent=True,
        ),
    ]


def _learning_charts(rows: MetricRows) -> list[Chart]:
    marks = rows.refreshes()
    loss = Chart("Loss", [_train(rows, "loss", "loss", 1)])
    if rows.points("train", "margin"):
        note = "It is ln 2 right after a refresh, and falls as the policy learns."
        loss = replace(loss, note=note, baseline=(math.log(2), "ln 2"), marks=marks)
    return [
        loss,
        Chart("Margin", [_train(rows, "margin", "margin", 3)], baseline=(0.0, ""), marks=marks),
        Chart(
            "Implicit accuracy",
            [_train(rows, "implicit_accuracy", "pairs with a margin above zero", 4)],
            note="It has no value right after a refresh, when all margins are zero.",
            baseline=(0.5, "chance"),
            percent=True,
            from_zero=True,
            marks=marks,
        ),
        Chart(
            "Error change of winner and loser",
            [
                _train(rows, "winner_error_change", "winner", 3),
                _train(rows, "loser_error_change", "loser", 5),
            ],
            note="Policy's error minus the reference's. If the winner's is above zero, the policy got worse on both.",
            baseline=(0.0, ""),
            marks=marks,
        ),
    ]


def _health_charts(rows: MetricRows) -> list[Chart]:
    return [
        Chart(
            "Score gap",
            [_train(rows, "reward/gap", "winner minus loser", 2)],
            note="Difference of the scores. If it collapses, the candidates have become alike.",
            from_zero=True,
        ),
        Chart(
            "Tie rate",
            [_train(rows, "tie_rate", "prompts without a pair", 5)],
            note="Share of prompts whose candidates score alike, which are skipped.",
            percent=True,
            from_zero=True,
        ),
        Chart("Gradient norm", [_train(rows, "grad_norm", "before clipping", 4)], from_zero=True),
        Chart("Learning rate", [Series("learning rate", rows.points("train", "lr"), 1)], from_zero=True),
        Chart(
            "Look of the clips",
            [
                Series(name, rows.points("eval", f"guards/style/{name}"), index)
                for index, name in enumerate(rows.names("eval", "guards/style/"), start=1)
            ],
            note="Held-out clips, change in standard deviations of the base policy's clips.",
            baseline=(0.0, "base"),
        ),
        Chart(
            "Still candidates",
            [_train(rows, "guards/still", "below the motion floor", 5)],
            note="Such candidates never win a pair.",
            percent=True,
            from_zero=True,
        ),
    ]


def _train(rows: MetricRows, name: str, label: str, colour: int) -> Series:
    return Series(label, rows.points("train", name), colour, noisy=True)


def _relative(rows: MetricRows, names: Sequence[str]) -> list[Series]:
    """Return pixel measures relative to their first value, without those that start at zero, or next to it."""
    series: list[Series] = []
    for name in names:
        points = rows.points("eval", f"held_out/pixels/{name}")
        if points and points[0][1] > _LEAST_BASE and len(series) < _MOST_SERIES:
            first = points[0][1]
            shares = [(x, y / first) for x, y in points]
            series.append(Series(describe(f"pixels/{name}").label.lower(), shares, len(series) + 1))
    return series


def _minus_first(points: Sequence[Point]) -> list[Point]:
    return [(x, y - points[0][1]) for x, y in points]
