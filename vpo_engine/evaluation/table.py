"""Results of an evaluation as a table in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from vpo_engine.evaluation.chosen_metrics import HEADINGS
from vpo_engine.evaluation.paired import Comparison, verdict
from vpo_engine.evaluation.results import all_measures
from vpo_engine.metrics.summary import PLACES, WIDTH, aligned, places_for
from vpo_engine.texts import counted

_NAMED = 5
"""Files that are named of those with a problem; the page names all."""


def format_results(results: Mapping[str, Any]) -> str:
    """Format a line for each measure, then what is missing."""
    compared = "baseline" in results["arms"]
    heads = (
        ["", "baseline", "policy", "change", "95 % bounds", "wins", "p", ""]
        if compared
        else ["", "mean", "videos", ""]
    )
    rows, group = [tuple(heads)], ""
    for entry in all_measures(results).values():
        if entry["group"] != group:
            group = entry["group"]
            rows.append((f"{HEADINGS[group]}:", *[""] * (len(heads) - 1)))
        rows.append(tuple(_compared_row(entry) if compared else _single_row(entry)))
    lines = [*_wrapped(heading(results)), "", *_fitted(rows), *_wrapped(quality_line(results)), ""]
    lines += _wrapped(results["statistics"]) if results["statistics"] else []
    return "\n".join([*lines, *note_lines(results), *problem_lines(results)]).rstrip()


def _fitted(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows; where that is wider than a terminal, each label gets a line of its own, above its numbers."""
    lines = aligned(rows)
    if max(map(len, lines)) <= WIDTH:
        return lines
    # A row without a p, such as a number of all videos, has no verdict but a remark, which follows its label.
    remarked = [row[-1] != "" and row[-2] == "" for row in rows]
    numbers = aligned(
        [("  ", *row[1:-1], "" if remark else row[-1]) for row, remark in zip(rows, remarked, strict=True)]
    )
    labels = [
        f"{row[0]}: {row[-1]}" if remark else row[0] for row, remark in zip(rows, remarked, strict=True)
    ]
    return [line for pair in zip(labels, numbers, strict=True) for line in pair if line]


def quality_line(results: Mapping[str, Any]) -> str:
    """Say VBench's quality score of each arm that has its seven dimensions; an empty text if none has."""
    scores = results.get("vbench_quality_score", {})
    found = ", ".join(f"{role} {scores[role]:.4f}" for role in ("baseline", "policy") if role in scores)
    return f"VBench's quality score, of its seven dimensions: {found}" if found else ""


def number_cells(entry: Mapping[str, Any], most: int = 8) -> dict[str, str]:
    """Return the texts of an entry's numbers, with as many decimal places as the bounds justify, at most ``most``."""
    found = entry.get("comparison")
    places = places_for(found["low"], found["high"], most) if found else 4
    cells = {role: _number(entry.get(role), places) for role in ("policy", "baseline")}
    if found is None:
        return {**cells, "difference": "", "bounds": "", "wins": "", "p": "", "result": _set_result(entry)}
    bounds = "none" if found["low"] is None else f"[{found['low']:+.{places}f}, {found['high']:+.{places}f}]"
    return {
        **cells,
        "difference": f"{found['difference']:+.{places}f}",
        "bounds": bounds,
        "wins": "" if found["win_rate"] is None else f"{100 * found['win_rate']:.0f} %",
        "p": _p_text(found["p_holm"]),
        "result": verdict(Comparison(**found), entry["better"]),
    }


def note_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what limits the numbers, for the terminal, once for all measures of a metric."""
    notes = {
        (entry["metric"], note): None
        for entry in all_measures(results).values()
        for role in ("policy", "baseline")
        for note in (entry.get(role) or {}).get("notes", [])
    }
    return [line for name, note in notes for line in _wrapped(f"- {name}: {note}")]


def problem_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what is missing from the results, for the terminal."""
    lines = [f"{name} could not be loaded: {why}" for name, why in results["unloaded"].items()]
    for role, problems in results["problems"].items():
        absent = [name for name, why in problems.items() if why == "is missing"]
        if absent:
            lines.append(
                f"1 video of the {role} is missing: {absent[0]!r}"
                if len(absent) == 1
                else f"{len(absent)} videos of the {role} are missing, such as {absent[0]!r}"
            )
        lines += _some(role, {name: why for name, why in problems.items() if why != "is missing"})
    for (name, role), failed in failures(results).items():
        lines += _some(f"{role}, {name}", failed)
    if results["partial"]:
        lines.insert(0, "PARTIAL: these numbers leave something out.")
    return [line for text in lines for line in _wrapped(f"- {text}" if text != lines[0] else text)]


def failures(results: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    """Return {(metric, arm): {file: reason}} of videos on which one metric failed, and others did not."""
    found = {}
    for entry in all_measures(results).values():
        for role, failed in entry["failed"].items():
            own = {file: why for file, why in failed.items() if file not in results["problems"][role]}
            if own:
                found[entry["metric"], role] = own
    return found


def _some(where: str, problems: Mapping[str, str]) -> list[str]:
    shown = [f"{where}: {name}: {why}" for name, why in list(problems.items())[:_NAMED]]
    more = len(problems) - _NAMED
    return [*shown, *([f"{where}: {more} more, which the page names"] if more > 0 else [])]


def _compared_row(entry: Mapping[str, Any]) -> list[str]:
    cells = number_cells(entry, PLACES)
    keys = ("baseline", "policy", "difference", "bounds", "wins", "p", "result")
    return [f" {title(entry)}", *(cells[key] for key in keys)]


def _single_row(entry: Mapping[str, Any]) -> list[str]:
    number = entry["policy"]
    count = "" if number is None else str(number["provenance"]["count"])
    return [f" {title(entry)}", _number(number, 4), count, "partial" if entry["failed"]["policy"] else ""]


def title(entry: Mapping[str, Any]) -> str:
    """Return a measure's label with its unit."""
    return f"{entry['label']} ({entry['unit']})" if entry["unit"] else str(entry["label"])


def _number(number: Mapping[str, Any] | None, places: int) -> str:
    return "none" if number is None or number["value"] is None else f"{number['value']:.{places}f}"


def _set_result(entry: Mapping[str, Any]) -> str:
    return "one number for all videos" if entry.get("policy") else ""


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def heading(results: Mapping[str, Any]) -> str:
    """Say in a sentence what was compared."""
    settings, arms = results["settings"], results["arms"]
    prompts = counted(settings["prompts"]["count"], "prompt")
    size = f"{settings['frames']} frames of {settings['height']} x {settings['width']} at {settings['fps']:g} fps"
    if "baseline" not in arms:
        return f"{arms['policy']['label']}: {counted(arms['policy']['videos'], 'video')} of {prompts}, {size}"
    noise = "the same prompts and noise" if settings["same_noise"] else "the same prompts"
    return (
        f"{arms['policy']['label']} against {arms['baseline']['label']}: {arms['policy']['videos']} and "
        f"{counted(arms['baseline']['videos'], 'video')} of {prompts}, {noise}, {size}"
    )


def _wrapped(text: str) -> Sequence[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  " if text.startswith("- ") else "")
