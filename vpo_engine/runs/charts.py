"""Line charts and bars as inline SVG, in the colours of the page (``--c1`` ... ``--c6``), light or dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 300.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 10.0, 24.0

_LEAST_SPAN = 1e-280
"""Ticks of a smaller range have no place among the numbers of a computer."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points in order of x. A ``noisy`` series is drawn faintly under its running mean; others get a dot per point."""

    label: str
    points: Sequence[Point]
    colour: int
    """The number of the line's colour, 1 to 6."""
    noisy: bool = False


@dataclass(frozen=True)
class Chart:
    """A line chart of one or several series."""

    title: str
    series: Sequence[Series]
    note: str = ""
    """A hint, in a few words, about what to look for."""
    baseline: tuple[float, str] | None = None
    """A value to compare with, and its name."""
    percent: bool = False
    """Values are shares, and are shown in per cent."""
    from_zero: bool = False
    """The vertical axis begins at zero, for values that are never negative."""
    marks: Sequence[float] = ()
    """Positions x of events, drawn as thin vertical lines."""


def nice_ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Return about ``count`` round numbers whose range covers low .. high; with ``whole`` no fractions."""
    if not high - low > _LEAST_SPAN:
        margin = abs(low) * 0.1 if abs(low) > _LEAST_SPAN else 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    if whole:
        step = float(max(1, math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def running_mean(points: Sequence[Point], width: int) -> list[Point]:
    """Return the centred mean over ``width`` points; near both ends over fewer, still symmetric, so it does not lag."""
    ys = [y for _, y in points]
    smooth = []
    for index, (x, _) in enumerate(points):
        reach = min(width // 2, index, len(points) - 1 - index)
        window = ys[index - reach : index + reach + 1]
        smooth.append((x, math.fsum(window) / len(window)))
    return smooth


def format_number(value: float, percent: bool = False) -> str:
    """Format with three significant digits, and without an exponent unless the number is very small or large."""
    if percent:
        return f"{100 * value:.3g}\N{NO-BREAK SPACE}%"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 4)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def line_chart(chart: Chart) -> str:
    """Return a <figure> with the title, a legend with each series' last value, and the plot; "" without points.

    The points are in an attribute of the figure, from which the page's script shows the values of any step.
    """
    drawn = [series for series in chart.series if series.points]
    if not drawn:
        return ""
    xs = [x for series in drawn for x, _ in series.points]
    ticks = _value_ticks(chart, drawn)
    x_ticks = [tick for tick in nice_ticks(min(xs), max(xs), 5, whole=True) if min(xs) <= tick <= max(xs)]
    to_x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    to_y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(ticks, x_ticks, to_x, to_y, chart.percent)]
    parts += [
        f'<line class="mark" x1="{to_x(x):.1f}" x2="{to_x(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        for x in chart.marks
    ]
    if chart.baseline is not None:
        parts.append(_baseline(*chart.baseline, to_y))
    parts += [_curve(series, to_x, to_y) for series in drawn]
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    legend = "".join(
        f'<li><i style="background:var(--c{series.colour})"></i>{escape(series.label)} '
        f"<b>{format_number(series.points[-1][1], chart.percent)}</b></li>"
        for series in drawn
    )
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return (
        f'<figure class="chart" data-chart="{escape(_data(chart, drawn, min(xs), max(xs)))}"><figcaption>'
        f'<h3>{escape(chart.title)}</h3>{note}<div class="readout" aria-live="polite" aria-atomic="true">'
        f'<span class="at">step {format_number(max(xs))}</span><ul class="legend">{legend}</ul></div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(_spoken(chart, drawn))}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _value_ticks(chart: Chart, drawn: Sequence[Series]) -> list[float]:
    """Return the ticks of the vertical axis; an axis of shares that are all zero ends at 100 %."""
    ys = [y for series in drawn for _, y in series.points]
    if chart.baseline is not None:
        ys.append(chart.baseline[0])
    if not chart.from_zero:
        return nice_ticks(min(ys), max(ys))
    return nice_ticks(0.0, max(ys) if max(ys) > 0 else 1.0)


def _spoken(chart: Chart, drawn: Sequence[Series]) -> str:
    """Describe a chart for those who do not see it, by the first and the last value of each series."""
    changes = [
        f"{series.label} from {format_number(series.points[0][1], chart.percent)} at step "
        f"{format_number(series.points[0][0])} to {format_number(series.points[-1][1], chart.percent)} at step "
        f"{format_number(series.points[-1][0])}"
        for series in drawn
    ]
    return f"{chart.title}: {'; '.join(changes)}"


def _data(chart: Chart, drawn: Sequence[Series], first: float, last: float) -> str:
    """Return what the page's script needs, as JSON: the steps at both ends of the axis, and all points."""
    points = [[[_short(x), _short(y)] for x, y in series.points] for series in drawn]
    content = {"first": first, "last": last, "left": LEFT, "right": WIDTH - RIGHT, "percent": chart.percent}
    return json.dumps(content | {"series": points}, separators=(",", ":"))


def _short(value: float) -> int | float:
    """Round to four significant digits; whole numbers below a million stay as they are."""
    return int(value) if value == int(value) and abs(value) < 1e6 else float(f"{value:.4g}")


def stacked_bar(parts: Sequence[tuple[str, float, int]]) -> str:
    """Draw parts (label, share of the whole, colour) side by side, with the label inside where it fits."""
    total = math.fsum(share for _, share, _ in parts)
    spoken = ", ".join(f"{label} {100 * share / total:.0f} %" for label, share, _ in parts)
    cells = "".join(
        f'<div style="flex:{share / total:.5f};background:var(--c{colour})" title="{escape(label)}">'
        f"{escape(label) if share / total > 0.16 else ''}</div>"
        for label, share, colour in parts
    )
    return f'<div class="stack" role="img" aria-label="Shares of the time: {escape(spoken)}">{cells}</div>'


def dumbbell(before: float, after: float, low: float, high: float) -> str:
    """Draw a hollow dot at ``before`` and a filled dot at ``after`` on a line from low to high.

    Nothing is coloured as good or bad: one clip does not tell a change from chance.
    """
    to_x = _scale(low, high, 5, 95)
    first, second = to_x(before), to_x(after)
    return (
        f'<svg class="dumbbell" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<line class="rail" x1="3" x2="97" y1="6" y2="6"/>'
        f'<line class="bar" x1="{first:.1f}" x2="{second:.1f}" y1="6" y2="6"/></svg>'
        f'<span class="dot from" style="left:{first:.1f}%"></span>'
        f'<span class="dot to" style="left:{second:.1f}%"></span>'
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low
    if span <= 0:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / span * (end - start)


def _axes(
    ticks: Sequence[float],
    x_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    percent: bool,
) -> str:
    parts = []
    for tick in ticks:
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="end">{format_number(tick, percent)}</text>'
        )
    for tick in x_ticks:
        parts.append(f'<text x="{to_x(tick):.1f}" y="{HEIGHT - 8}" class="mid">{format_number(tick)}</text>')
    return "".join(parts)


def _baseline(value: float, label: str, to_y: Callable[[float], float]) -> str:
    y = to_y(value)
    label_y = y - 4 if y - 4 > TOP + 8 else y + 12
    return (
        f'<line class="baseline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{WIDTH - RIGHT - 2}" y="{label_y:.1f}" class="end">{escape(label)}</text>'
    )


def _curve(series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    colour = f"stroke:var(--c{series.colour})"
    count = len(series.points)
    if series.noisy and count >= 12:
        smooth = running_mean(series.points, max(3, count // 10))
        return (
            f'<polyline class="faint" style="{colour}" points="{_path(series.points, to_x, to_y)}"/>'
            f'<polyline class="line" style="{colour}" points="{_path(smooth, to_x, to_y)}"/>'
        )
    line = f'<polyline class="line" style="{colour}" points="{_path(series.points, to_x, to_y)}"/>'
    if count > 40:
        return line
    dots = "".join(
        f'<circle r="3" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" style="fill:var(--c{series.colour})"/>'
        for x, y in series.points
    )
    return line + dots


def _path(points: Sequence[Point], to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    return " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)
