"""The report's sections with numbers: tiles, charts, times and the summary table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vpo_engine.metrics.summary import BETTER, bounds_text, change, number_texts
from vpo_engine.runs.charts import Chart, Point, Series, format_number, line_chart, stacked_bar
from vpo_engine.runs.log import Row
from vpo_engine.runs.progress import format_seconds
from vpo_engine.runs.report_clips import missing

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
_STAGES = {
    "text": "the text encoder embeds the prompts",
    "rollout": "the policy samples candidates for each prompt",
    "decode": "the VAE decodes the candidates' latents to videos",
    "reward": "the reward model scores the candidates",
    "update": "the policy is trained on pairs of the best and the worst candidate",
    "refresh": "the reference is set to the policy",
    "evaluate": "the policy samples held-out prompts, and the videos are scored",
    "checkpoint": "a checkpoint is saved",
}
_OTHER = "outside all stages"
_MOST_SERIES = 6
_MOST_MARKS = 40

Summary = Mapping[str, Any]


class MetricRows:
    """The rows of ``metrics.jsonl``, read as series of points."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}
        self.steps = int(self._rows["train"][-1]["step"]) if self._rows["train"] else 0

    def __bool__(self) -> bool:
        return any(self._rows.values())

    def points(self, kind: str, name: str) -> list[Point]:
        return [(float(row["step"]), float(row[name])) for row in self._rows[kind] if name in row]

    def names(self, kind: str, prefix: str) -> list[str]:
        """Return the metrics' names that start with ``prefix``, without it, in order of appearance."""
        found = dict.fromkeys(name for row in self._rows[kind] for name in row if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in found]

    def first(self, kind: str, prefix: str) -> dict[str, float]:
        """Return the metrics of the first row whose names start with ``prefix``, without the prefix."""
        row = next(iter(self._rows[kind]), {})
        return {name.removeprefix(prefix): float(row[name]) for name in row if name.startswith(prefix)}

    def refreshes(self) -> list[float]:
        """Return the steps that ended with a refresh of the reference; [] if there are too many to tell apart."""
        steps = [
            float(row["step"])
            for row in self._rows["train"]
            if row.get("reference_age") == 0 and row.get("optimizer_steps") != 0
        ]
        return steps if len(steps) <= _MOST_MARKS else []


def tiles(summary: Summary | None, rows: MetricRows) -> str:
    """Return the most important numbers as HTML tiles."""
    cells = []
    measures = summary["measures"] if summary else {}
    for name, label in (
        ("reward/selected", "Held-out reward"),
        ("judge/selected", "Independent judge"),
    ):
        if name in measures:
            numbers = measures[name]
            bounds = bounds_text(numbers, 2, "95 %: {} to {}", "one clip: no bounds")
            detail = f"{numbers['before']:.2f} → {numbers['after']:.2f}\n{bounds}"
            cells.append(_tile(label, f"{numbers['difference']:+.2f}", detail, change(name, numbers)))
    for name, label in (
        ("pixels/jitter", "Jitter"),
        ("pixels/colour_change", "Colour change"),
        ("pixels/displacement", "Displacement"),
    ):
        if name in measures and "relative" in measures[name]:
            numbers = measures[name]
            detail = f"{numbers['before']:.3g} → {numbers['after']:.3g}"
            cells.append(_tile(label, f"{100 * numbers['relative']:+.0f} %", detail, change(name, numbers)))
    seconds = [y for _, y in rows.points("train", "seconds/step")]
    if seconds:
        typical = sorted(seconds)[len(seconds) // 2]
        total = format_seconds(math.fsum(seconds))
        cells.append(_tile("Time per step", _short_seconds(typical), f"{len(seconds)} steps, {total}", ""))
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


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
    lead = f"The horizontal axis is the training step. Thin lines are single steps, thick ones running means.{marks}"
    return f'<section><h2>Curves</h2><p class="soft">{lead}</p>{body}</section>'


def time_section(rows: MetricRows) -> str:
    stages = [(name, rows.points("train", f"seconds/{name}")) for name in _STAGES]
    totals = [(name, math.fsum(y for _, y in points)) for name, points in stages if points]
    totals = [(name, seconds) for name, seconds in totals if seconds > 0]
    if not totals:
        return missing("Where the time went", "No stage timings were logged yet.")
    steps = len(rows.points("train", "seconds/step")) or 1
    whole = math.fsum(y for _, y in rows.points("train", "seconds/step"))
    staged = math.fsum(seconds for _, seconds in totals)
    if whole - staged > 0.001 * whole:
        totals.append(("other", whole - staged))
    whole = max(whole, staged)
    coloured = [(name, seconds / whole, index % 6 + 1) for index, (name, seconds) in enumerate(totals)]
    ceiling = rows.points("train", "speed/ceiling")
    body = "".join(
        f'<tr><td><i style="background:var(--c{colour})"></i>{name} '
        f'<span class="soft">{_STAGES.get(name, _OTHER)}</span></td>'
        + _cells(_short_seconds(share * whole), _short_seconds(share * whole / steps), f"{100 * share:.1f} %")
        + (_cells(_typical_percent(rows, f"speed/{name}_mfu")) if ceiling else "")
        + "</tr>"
        for name, share, colour in coloured
    )
    heads = ("stage", "in all", "per step", "share", *(["of peak"] if ceiling else []))
    return (
        f"<section><h2>Where the time went</h2>{stacked_bar(coloured)}"
        f"{_table(heads, body)}{_speed(rows, ceiling)}</section>"
    )


def _speed(rows: MetricRows, ceiling: Sequence[Point]) -> str:
    """Return the candidates per second, and an explanation of the column "of peak"."""
    if not ceiling:
        return ""
    samples = rows.points("train", "speed/samples_per_second")
    sampled = (
        f"{format_number(_median(samples))} candidates per second in a typical step. " if samples else ""
    )
    return (
        f'<p class="soft">{sampled}"Of peak" is the arithmetic of the network as a share of what the device could have '
        f"computed in that time. The device's peak, {_flops(ceiling[-1][1])}, is that of the fastest matrix product "
        "measured when the run started.</p>"
    )


def summary_section(summary: Summary | None) -> str:
    if summary is None:
        return missing("Held-out measures", "There is no summary yet; a run writes it when it ends.")
    body = ""
    for name, numbers in summary["measures"].items():
        relative = f"{100 * numbers['relative']:+.1f} %" if "relative" in numbers else ""
        word = change(name, numbers)
        body += (
            f"<tr><td>{escape(name)}</td>{_cells(*number_texts(numbers), relative)}"
            f'<td class="{word}">{word}</td></tr>'
        )
    return (
        "<section><h2>Held-out measures</h2>"
        f'<p class="soft">{clips_text(summary["clips"])}</p>'
        f"{_table(('measure', 'base', 'final', 'difference', '95 % bounds', 'relative', ''), body)}</section>"
    )


def clips_text(clips: int) -> str:
    """Say in sentences which clips were compared, and what their bounds mean."""
    if clips == 1:
        return (
            "One clip, sampled from the same prompt and noise before and after training. One clip has no bounds, so "
            "its changes may be chance: hold out a second prompt, or set evaluation.samples_per_prompt=2."
        )
    return (
        f"{clips} clips, sampled from the same prompts and noise before and after training. The 95 % bounds are over "
        "clips, not over seeds."
    )


def _outcome_charts(rows: MetricRows) -> list[Chart]:
    dimensions = [d for d in DIMENSIONS if rows.points("eval", f"held_out/reward/{d}")]
    changes = [
        Series(name.replace("_", " "), _minus_first(rows.points("eval", f"held_out/reward/{name}")), index)
        for index, name in enumerate(dimensions, start=1)
    ]
    pixels = rows.names("eval", "held_out/pixels/")
    damage = [name for name in pixels if BETTER.get(name) == -1]
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
            note="Change since the start, on held-out prompts.",
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
    return [
        Chart(
            "Loss",
            [_train(rows, "loss", "loss", 1)],
            note="It is ln 2 right after a refresh, and falls as the policy learns.",
            baseline=(math.log(2), "ln 2"),
            marks=marks,
        ),
        Chart("Margin", [_train(rows, "margin", "margin", 3)], baseline=(0.0, ""), marks=marks),
        Chart(
            "Implicit accuracy",
            [_train(rows, "implicit_accuracy", "pairs with margin above zero", 4)],
            baseline=(0.5, "chance"),
            percent=True,
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
            note="If it collapses, the candidates have become alike.",
        ),
        Chart("Tie rate", [_train(rows, "tie_rate", "pairs skipped as ties", 5)], percent=True),
        Chart("Gradient norm", [_train(rows, "grad_norm", "before clipping", 4)]),
        Chart("Learning rate", [Series("learning rate", rows.points("train", "lr"), 1)]),
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
        ),
    ]


def _train(rows: MetricRows, name: str, label: str, colour: int) -> Series:
    return Series(label, rows.points("train", name), colour, noisy=True)


def _relative(rows: MetricRows, names: Sequence[str]) -> list[Series]:
    """Return pixel measures relative to their first value, without those that start at zero."""
    series: list[Series] = []
    for name in names:
        points = rows.points("eval", f"held_out/pixels/{name}")
        if points and points[0][1] > 0 and len(series) < _MOST_SERIES:
            first = points[0][1]
            shares = [(x, y / first) for x, y in points]
            series.append(Series(name.replace("_", " "), shares, len(series) + 1))
    return series


def _minus_first(points: Sequence[Point]) -> list[Point]:
    return [(x, y - points[0][1]) for x, y in points]


def _tile(label: str, value: str, detail: str, sense: str) -> str:
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div>'
        f'<div class="value {sense}">{escape(value)}</div><div class="detail">{escape(detail)}</div></div>'
    )


def _cells(*texts: str) -> str:
    return "".join(f'<td class="num">{escape(text)}</td>' for text in texts)


def _table(heads: Sequence[str], body: str) -> str:
    first, *others = (escape(head) for head in heads)
    row = f"<th>{first}</th>" + "".join(f'<th class="num">{head}</th>' for head in others)
    return f'<div class="scroll"><table><thead><tr>{row}</tr></thead><tbody>{body}</tbody></table></div>'


def _median(points: Sequence[Point]) -> float:
    return statistics.median(y for _, y in points)


def _typical_percent(rows: MetricRows, name: str) -> str:
    points = rows.points("train", name)
    return f"{100 * _median(points):.0f} %" if points else ""


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _short_seconds(seconds: float) -> str:
    """Format a duration in milliseconds, in seconds with two decimals, or as ``format_seconds`` from a minute on."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 60 else format_seconds(seconds)
