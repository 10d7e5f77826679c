"""The page of an evaluation: its numbers, and the videos side by side, in one file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vpo_engine.evaluation.chosen_metrics import HEADINGS
from vpo_engine.evaluation.results import all_measures
from vpo_engine.evaluation.table import failures, heading, number_cells, quality_line, title
from vpo_engine.full_disk import write_whole
from vpo_engine.runs.frame_sheets import make_frame_sheet
from vpo_engine.runs.report_html import cells, page, table
from vpo_engine.runs.video import read_video

_MOST_CARDS = 120
_BYTES = 24_000_000
"""Bytes of all images, which base64 makes a third larger."""
_LEAST_SHEET = 8_000
_WIDE = 128
_RESULTS = {"better": "better", "worse": "worse", "changed": "changed"}
_FACTS = ("version", "backbone", "frames", "fps", "resolution", "count", "aggregation")


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page of results, with the videos of at most 120 rows."""
    videos = _videos(results, path.parent)
    body = "\n".join([_header(results), _problems(results), _table(results), videos, _provenance(results)])
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    write_whole(path, page(f"Evaluation of {results['arms']['policy']['label']}", body, style, script))


def _header(results: Mapping[str, Any]) -> str:
    counted = {"better": 0, "worse": 0}
    entries = [each for each in all_measures(results).values() if each["group"] != "proxy"]
    for entry in entries:
        word = number_cells(entry)["result"]
        if word in counted:
            counted[word] += 1
    if "baseline" in results["arms"]:
        of = f"of {len(entries)} measures"
        name = f"{counted['better']} {of} are better than the baseline's, {counted['worse']} worse"
    else:
        name = f"{len(entries)} measures of {results['arms']['policy']['videos']} videos"
    partial = (
        '<p class="verdict worse">These results are partial: see below what is left out.</p>'
        if results["partial"]
        else ""
    )
    return (
        f'<header><p class="eyebrow">Evaluation of <b>{escape(results["arms"]["policy"]["label"])}</b></p>'
        f'<h1>{escape(name)}</h1><p class="verdict">{escape(heading(results))}.</p>{partial}</header>'
    )


def _problems(results: Mapping[str, Any]) -> str:
    lines = [
        f"<b>{escape(name)}</b> could not be loaded: {escape(why)}"
        for name, why in results["unloaded"].items()
    ]
    for role, problems in results["problems"].items():
        lines += [f"{role}: <b>{escape(name)}</b> {escape(why)}" for name, why in problems.items()]
    for (name, role), failed in failures(results).items():
        lines += [
            f"{role}, {escape(name)}: <b>{escape(file)}</b>: {escape(why)}" for file, why in failed.items()
        ]
    if not lines:
        return ""
    rows = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section id="problems"><h2>Left out</h2><ul class="problems">{rows}</ul></section>'


def _table(results: Mapping[str, Any]) -> str:
    compared = "baseline" in results["arms"]
    heads = (
        ("baseline", "policy", "change", "95 % bounds", "wins", "p", "result")
        if compared
        else ("mean", "videos")
    )
    body, group = "", ""
    for name, entry in all_measures(results).items():
        if entry["group"] != group:
            group = entry["group"]
            span = f'colspan="{1 + len(heads)}" scope="colgroup"'
            body += f'<tr class="group"><th {span}>{escape(HEADINGS[group])}</th></tr>'
        body += _row(name, entry, heads, compared)
    said = (quality_line(results), results["statistics"])
    note = "".join(f'<p class="soft">{escape(text)}</p>' for text in said if text)
    return f"<section><h2>Measures</h2>{note}{table(('measure', *heads), body)}</section>"


def _row(name: str, entry: Mapping[str, Any], heads: Sequence[str], compared: bool) -> str:
    shown = number_cells(entry)
    if compared:
        keys = ("baseline", "policy", "difference", "bounds", "wins", "p")
        numbers = cells([shown[key] for key in keys], heads[:-1])
        sense = _RESULTS.get(shown["result"], "")
        numbers += f'<td class="num {sense}" data-head="result">{escape(shown["result"])}</td>'
    else:
        count = "" if entry["policy"] is None else str(entry["policy"]["provenance"]["count"])
        numbers = cells([shown["policy"], count], heads)
    notes = {note for role in ("policy", "baseline") for note in (entry.get(role) or {}).get("notes", [])}
    said = "".join(f' <span class="soft">{escape(note)}</span>' for note in sorted(notes))
    return (
        f'<tr data-measure="{escape(name)}"><td>{escape(title(entry))} '
        f'<span class="soft">{escape(entry["meaning"])}</span>{said}</td>{numbers}</tr>'
    )


def _videos(results: Mapping[str, Any], root: Path) -> str:
    rows = [row for row in results["videos"] if "policy" in row or "baseline" in row]
    shown = _shown(rows, results)
    roles = [role for role in ("baseline", "policy") if role in results["arms"]]
    budget = max(_LEAST_SHEET, _BYTES // max(1, len(shown) * len(roles)))
    cards, sizes = [], []
    for number, row in enumerate(shown):
        card, size = _card(number, row, roles, budget, all_measures(results), root)
        cards.append(card)
        sizes += size
    if not sizes:
        return '<section><h2>Videos</h2><p class="missing">No video could be read.</p></section>'
    frames, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    chosen = (
        f"All {len(rows)} rows of videos."
        if len(shown) == len(rows)
        else f"{len(shown)} of {len(rows)} rows of videos, spread evenly over the differences of the first measure "
        "of single videos, from the largest loss to the largest gain."
    )
    sides = "The baseline is on the left, the policy on the right. " if len(roles) > 1 else ""
    return (
        f'<section id="videos" data-fps="{results["settings"]["fps"]:g}" data-frames="{frames}"><h2>Videos</h2>'
        f'<p class="soft">{escape(sides + chosen)} One row alone does not tell a difference from chance.</p>'
        f"{_controls(results, shown, frames)}<noscript><p>Playing the videos needs JavaScript.</p></noscript>"
        f'<div class="cards{" wide" if width >= _WIDE else ""}">{"".join(cards)}</div></section>'
    )


def _controls(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], frames: int) -> str:
    """Return the player's controls, and a choice of the measure that the rows are sorted by."""
    present = {
        name
        for row in rows
        for role in ("policy", "baseline")
        for name in row.get(role, {}).get("values", {})
    }
    options = "".join(
        f'<option value="{escape(name)}">{escape(title(entry))}</option>'
        for name, entry in all_measures(results).items()
        if name in present
    )
    what = "difference" if "baseline" in results["arms"] else "value"
    return (
        '<div class="transport"><button type="button" class="play">Play</button>'
        f'<input type="range" min="0" max="{frames - 1}" value="0" aria-label="frame"><output></output>'
        '<label><input type="checkbox" class="slow"> quarter speed</label>'
        f'<label class="sort">sort by {what} of <select class="by"><option value="">prompt</option>{options}</select>'
        "</label>"
        '<button type="button" class="order" aria-pressed="false">largest first</button></div>'
    )


def _card(
    number: int,
    row: Mapping[str, Any],
    roles: Sequence[str],
    budget: int,
    measures: Mapping[str, Any],
    root: Path,
) -> tuple[str, list[tuple[int, int]]]:
    """Return the card of a row, and frames and width of its videos."""
    clips, sizes = "", []
    for role in roles:
        if role not in row:
            clips += f'<figure class="clip"><p class="missing">no video</p><figcaption>{role}</figcaption></figure>'
            continue
        try:
            frames = read_video(root / row[role]["file"])[0]
        except (ValueError, OSError):
            clips += f'<figure class="clip"><p class="missing">not readable</p><figcaption>{role}</figcaption></figure>'
            continue
        sheet = make_frame_sheet(frames, budget)
        sizes.append((sheet.frames, sheet.width))
        spoken = escape(f"{role}: {row['prompt']}, number {row['index']}")
        clips += (
            f'<figure class="clip"><canvas{" class=exact" if sheet.exact else ""} width="{sheet.width}" '
            f'height="{sheet.height}" data-columns="{sheet.columns}" data-frames="{sheet.frames}" role="img" '
            f'aria-label="{spoken}"></canvas><img alt="" data-src="{sheet.url}">'
            f'<figcaption>{role} <b data-role="{role}"></b></figcaption></figure>'
        )
    values = {role: row.get(role, {}).get("values", {}) for role in roles}
    data = {
        name: [values[role].get(name) for role in roles]
        for name in measures
        if any(name in v for v in values.values())
    }
    prompt = escape(row["prompt"])
    card = (
        f'<article class="card" data-number="{number}" data-values="{escape(json.dumps(data))}">'
        f'<p class="prompt" title="{prompt}">{prompt}</p><p class="meta">number {row["index"]}'
        f'<span class="chosen"></span></p><div class="{"two" if len(roles) > 1 else "one"}">{clips}</div>'
        f'<details class="all"><summary>all values</summary><dl class="scores">{_values(data, measures)}</dl></details>'
        "</article>"
    )
    return card, sizes


def _values(data: Mapping[str, Sequence[float | None]], measures: Mapping[str, Any]) -> str:
    def text(value: float | None) -> str:
        return "none" if value is None else f"{value:.4g}"

    return "".join(
        f"<dt>{escape(title(measures[name]))}</dt><dd>{escape(' → '.join(map(text, values)))}</dd>"
        for name, values in data.items()
    )


def _shown(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows that are shown: all, or some spread evenly over the differences of the first measure that single
    videos have."""
    if len(rows) <= _MOST_CARDS:
        return list(rows)
    of_videos = {
        name for row in rows for role in results["arms"] for name in row.get(role, {}).get("values", {})
    }
    name = next((name for name in all_measures(results) if name in of_videos), "")

    def place(row: Mapping[str, Any]) -> float:
        values = [row.get(role, {}).get("values", {}).get(name, 0.0) for role in ("policy", "baseline")]
        return float(values[0] - values[1]) if "baseline" in results["arms"] else float(values[0])

    ordered = sorted(range(len(rows)), key=lambda number: place(rows[number]))
    last = len(ordered) - 1
    chosen = {ordered[round(step * last / (_MOST_CARDS - 1))] for step in range(_MOST_CARDS)}
    return [row for number, row in enumerate(rows) if number in chosen]


def _provenance(results: Mapping[str, Any]) -> str:
    rows = ""
    for name, entry in all_measures(results).items():
        number = entry.get("policy") or entry.get("baseline")
        if number is None:
            continue
        found = number["provenance"]
        facts = [f"{fact} {_fact(found[fact])}" for fact in _FACTS]
        facts += [f"{key} {value}" for key, value in found["settings"].items()]
        facts += [f"{file} SHA-256 {digest}" for file, digest in found["weights"].items()]
        facts.append(f"prompts SHA-256 {found['prompts']}")
        rows += f"<dt>{escape(name)}</dt><dd>{escape('; '.join(facts))}</dd>"
    settings = escape(json.dumps(results["settings"], indent=1, ensure_ascii=False))
    return (
        "<section><h2>Where the numbers come from</h2><details><summary>metrics, weights and settings</summary>"
        f'<dl class="facts">{rows}</dl><pre>{settings}</pre></details></section>'
    )


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
