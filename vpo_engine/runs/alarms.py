"""``alarms.jsonl``: the alarms that a run raised about its reward, and their section of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vpo_engine.full_disk import write_whole
from vpo_engine.metrics.measures import describe
from vpo_engine.runs.charts import Chart, Series, line_chart
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.readable import readable
from vpo_engine.runs.report_rows import MetricRows
from vpo_engine.texts import parse_json, read_text

_TITLES = {
    "prompt": "The reward does not read prompts",
    "divergence": "The training reward rises while the held-out reward falls",
    "style": "The clips look different",
    "saturation": "The log-sigmoid is saturated",
    "shortcut": "Winners get worse together with losers",
    "motion": "The candidates move less",
    "prompt_blind": "The policy exploits a score that does not read the prompt",
}


def write_alarms(run: RunDirectory, alarms: Sequence[Mapping[str, Any]]) -> None:
    """Write all alarms, each {"step": int, "kind": str, "text": str}; the file is replaced atomically.

    An alarm of the watch has also "metric", the number of the log that raised it, and "limit", up to which it is
    tolerated; others have "" and null there.
    """
    write_whole(run.alarms, "".join(json.dumps(alarm) + "\n" for alarm in alarms))


def read_alarms(run: RunDirectory) -> list[dict[str, Any]] | None:
    """Read the alarms of a run; None if the run had no monitor."""
    if not run.alarms.is_file():
        return None
    with readable(run.alarms, "remove it for a report without alarms"):
        lines = read_text(run.alarms).split("\n")
        return [_read(parse_json(line)) for line in lines if line]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _read(alarm: Mapping[str, Any]) -> dict[str, Any]:
    found = {"step": int(alarm["step"]), "kind": _text(alarm["kind"]), "text": _text(alarm["text"])}
    if alarm.get("metric"):
        found |= {"metric": _text(alarm["metric"]), "limit": float(alarm["limit"])}
    return found


def alarm_section(
    alarms: Sequence[Mapping[str, Any]] | None, prompt_shares: Mapping[str, float], rows: MetricRows
) -> str:
    """Return the report's section of alarms as HTML, with the curve of the number that raised an alarm of the watch.

    prompt_shares: result of the prompt check at the start, {dimension: share}; empty if it was not made.
    """
    if alarms is None:
        return ""
    body = "".join(
        f'<p><b class="worse">{escape(_TITLES.get(alarm["kind"], alarm["kind"]))}</b>, step {alarm["step"]}: '
        f"{escape(alarm['text'])}.</p>{_curve(alarm, rows)}"
        for alarm in alarms
    )
    if not alarms:
        body = (
            '<p class="soft">No alarm was raised: there is no sign that the policy exploits the reward.</p>'
        )
    if prompt_shares:
        shares = ", ".join(
            f"{describe(f'reward/{name}').label.lower()} {share:.2f}" for name, share in prompt_shares.items()
        )
        body += (
            '<p class="soft">Before the first step: share of the base policy\'s clips that score higher with their own '
            f"prompt than with another clip's prompt: {escape(shares)}. A dimension that does not read the prompt has "
            "0.</p>"
        )
    return f"<section><h2>Alarms</h2>{body}</section>"


def _curve(alarm: Mapping[str, Any], rows: MetricRows) -> str:
    """Draw the number that raised an alarm, what is tolerated of it, and the step of the alarm."""
    name = alarm.get("metric")
    if not name:
        return ""
    label = name.rpartition("/")[2].replace("_", " ")
    chart = Chart(
        label.capitalize(),
        [Series(label, rows.points("train", name), 5, noisy=True)],
        note="The dotted vertical line marks the alarm.",
        baseline=(alarm["limit"], "tolerated"),
        marks=[float(alarm["step"])],
    )
    drawn = line_chart(chart)
    return f'<div class="charts">{drawn}</div>' if drawn else ""
