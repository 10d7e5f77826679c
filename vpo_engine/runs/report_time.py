"""The report's section about time. Its numbers are those that the terminal and ``summary.json`` give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from vpo_engine.metrics.time_account import STAGES, TimeAccount, account, format_duration
from vpo_engine.runs.charts import Point, format_number, stacked_bar
from vpo_engine.runs.report_html import cells, missing, table
from vpo_engine.runs.report_rows import MetricRows


def whole_account(timings: Mapping[str, float] | None, rows: MetricRows) -> TimeAccount:
    """Return the account of a run: of its summary's ``timings``, or of its rows while it has no summary."""
    return account(timings or rows.timings)


def time_section(timings: Mapping[str, float] | None, rows: MetricRows) -> str:
    """Return the table of stages. timings: of the summary; None while there is none."""
    found = whole_account(timings, rows)
    if not found.parts:
        return missing("Where the time went", "No stage timings were logged yet.")
    steps = rows.count("seconds/step") or 1
    shares = [
        (name, seconds / found.whole, index % 6 + 1)
        for index, (name, seconds) in enumerate(found.parts.items())
    ]
    ceiling = rows.points("train", "speed/ceiling")
    heads = ("in all", "mean per step", "share", *(["of peak"] if ceiling else []))
    body = ""
    for name, share, colour in shares:
        seconds = share * found.whole
        texts = [short_seconds(seconds), short_seconds(seconds / steps), f"{100 * share:.1f} %"]
        texts += [_typical_percent(rows, f"speed/{name}_mfu")] if ceiling else []
        body += (
            f'<tr><td><i style="background:var(--c{colour})"></i>{escape(name)} '
            f'<span class="soft">{escape(STAGES.get(name, ""))}</span></td>{cells(texts, heads)}</tr>'
        )
    total = [
        short_seconds(found.whole),
        short_seconds(found.whole / steps),
        "100 %",
        *([""] if ceiling else []),
    ]
    body += f'<tr class="total"><td>all of it</td>{cells(total, heads)}</tr>'
    return (
        f"<section><h2>Where the time went</h2>{_lead(found, rows, steps)}{stacked_bar(shares)}"
        f"{table(('stage', *heads), body)}{_speed(rows, ceiling)}</section>"
    )


def short_seconds(seconds: float) -> str:
    """Format a duration as the terminal does, but those below a second with more digits."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 1 else format_duration(seconds)


def _lead(found: TimeAccount, rows: MetricRows, steps: int) -> str:
    typical = rows.median("seconds/step")
    median = "" if typical is None else f" The median step took {short_seconds(typical)}."
    return (
        f'<p class="soft">The run took {short_seconds(found.whole)}, evaluations and checkpoints included. That is a '
        f"mean of {short_seconds(found.whole / steps)} for each of {steps} steps.{median}</p>"
    )


def _speed(rows: MetricRows, ceiling: Sequence[Point]) -> str:
    """Return the candidates per second, and an explanation of the column "of peak"."""
    if not ceiling:
        return ""
    typical = rows.median("speed/samples_per_second")
    sampled = (
        "" if typical is None else f"{format_number(typical)} candidates per second in the median step. "
    )
    return (
        f'<p class="soft">{sampled}"Of peak" is the arithmetic of the network as a share of what the device could have '
        f"computed in that time, in the median step. The device's peak, {_flops(ceiling[-1][1])}, is that of the "
        "fastest matrix product measured when the run started.</p>"
    )


def _typical_percent(rows: MetricRows, name: str) -> str:
    share = rows.median(name)
    return "" if share is None else f"{100 * share:.0f} %"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
