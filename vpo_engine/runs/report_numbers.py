"""The report's tiles and its table of held-out measures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from vpo_engine.metrics.measures import GROUP_MEANINGS, GROUPS, describe
from vpo_engine.metrics.summary import bounds_text, change, change_text, number_texts, relative_text
from vpo_engine.runs.charts import format_number
from vpo_engine.runs.report_html import cells, missing, table
from vpo_engine.runs.report_rows import MetricRows
from vpo_engine.runs.report_time import short_seconds, whole_account
from vpo_engine.texts import counted

_SCORES = {"reward/selected": "Held-out reward", "judge/selected": "Independent judge"}
_PIXELS = ("pixels/jitter", "pixels/colour_change", "pixels/displacement", "pixels/motion")

Summary = Mapping[str, Any]


def tiles(summary: Summary | None, rows: MetricRows) -> str:
    """Return the most important numbers as HTML tiles, each with its bounds and whether it is clear."""
    measures = summary["measures"] if summary else {}
    shown = [_score_tile(name, measures[name]) for name in _SCORES if name in measures]
    shown += [
        _pixel_tile(name, measures) for name in _PIXELS if name in measures and "relative" in measures[name]
    ]
    typical = rows.median("seconds/step")
    if typical is not None:
        whole = whole_account(summary["timings"] if summary else None, rows).whole
        steps = rows.count("seconds/step")
        detail = (
            f"mean {short_seconds(whole / steps)}\n{counted(steps, 'step')}, {short_seconds(whole)} in all"
        )
        shown.append(_tile("Median time per step", short_seconds(typical), detail))
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def summary_section(summary: Summary | None) -> str:
    """Return the table of all held-out measures, grouped by kind."""
    if summary is None:
        return missing("Held-out measures", "There is no summary yet; a run writes it when it ends.")
    heads = ("base", "final", "change", "95 % bounds", "of base", "result")
    body, group, measures = "", "", summary["measures"]
    for name, numbers in measures.items():
        kind = name.partition("/")[0]
        if kind != group:
            group = kind
            meaning = f": {GROUP_MEANINGS[kind]}" if kind in GROUP_MEANINGS else ""
            body += (
                f'<tr class="group"><th colspan="{1 + len(heads)}" scope="colgroup">'
                f'{escape(GROUPS.get(kind, kind))}<span class="soft">{escape(meaning)}</span></th></tr>'
            )
        measure = describe(name, measures)
        body += (
            f'<tr><td>{escape(measure.title)} <span class="soft">{escape(measure.meaning)}</span></td>'
            f"{cells((*number_texts(numbers), relative_text(numbers)), heads[:-1])}"
            f'<td class="num {change(name, numbers)}" data-head="{heads[-1]}">{change_text(name, numbers)}</td></tr>'
        )
    return (
        "<section><h2>Held-out measures</h2>"
        f'<p class="soft">{clips_text(summary["clips"])} "Not clear" means that the bounds include zero.</p>'
        f"{table(('measure', *heads), body)}</section>"
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


def _score_tile(name: str, numbers: Mapping[str, Any]) -> str:
    bounds = bounds_text(numbers, 2, "95 %: {} to {}", "one clip")
    detail = f"{numbers['before']:.2f} → {numbers['after']:.2f}\n{bounds}"
    return _tile(_SCORES[name], f"{numbers['difference']:+.2f}", detail, name, numbers)


def _pixel_tile(name: str, measures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tile of a change in per cent of the base value, as are its bounds."""
    numbers, measure = measures[name], describe(name, measures)
    base = numbers["before"]
    bounds = "one clip"
    if numbers["low"] is not None:
        low, high = 100 * numbers["low"] / base, 100 * numbers["high"] / base
        places = 0 if high - low >= 10 else 1
        bounds = f"95 %: {low:+.{places}f} to {high:+.{places}f}\N{NO-BREAK SPACE}%"
    detail = f"{format_number(base)} → {format_number(numbers['after'])} {measure.unit}\n{bounds}"
    return _tile(measure.label, f"{100 * numbers['relative']:+.0f} %", detail, name, numbers)


def _tile(
    label: str, value: str, detail: str, name: str = "", numbers: Mapping[str, Any] | None = None
) -> str:
    """Return a tile. The value is coloured only if its bounds exclude zero; the words under it say which it is."""
    sense, words = "", ""
    if numbers is not None:
        word = change(name, numbers)
        sense = word if word in ("better", "worse") else ""
        words = f'<div class="result {sense}">{change_text(name, numbers)}</div>'
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div>'
        f'<div class="value {sense}">{escape(value)}</div>{words}<div class="detail">{escape(detail)}</div></div>'
    )
