"""``alarms.jsonl``: the alarms that a run raised about its reward, and their section of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vpo_engine.full_disk import write_whole
from vpo_engine.metrics.measures import describe
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.readable import readable
from vpo_engine.texts import parse_json, read_text

_TITLES = {
    "prompt": "The reward does not read prompts",
    "divergence": "The training reward rises while the held-out reward falls",
    "style": "The clips look different",
}


def write_alarms(run: RunDirectory, alarms: Sequence[Mapping[str, Any]]) -> None:
    """Write all alarms, each {"step": int, "kind": str, "text": str}; the file is replaced atomically."""
    write_whole(run.alarms, "".join(json.dumps(alarm) + "\n" for alarm in alarms))


def read_alarms(run: RunDirectory) -> list[dict[str, Any]] | None:
    """Read the alarms of a run; None if the run had no monitor."""
    if not run.alarms.is_file():
        return None
    with readable(run.alarms, "remove it for a report without alarms"):
        lines = read_text(run.alarms).split("\n")
        alarms = [parse_json(line) for line in lines if line]
        return [
            {"step": int(each["step"]), "kind": _text(each["kind"]), "text": _text(each["text"])}
            for each in alarms
        ]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def alarm_section(alarms: Sequence[Mapping[str, Any]] | None, prompt_shares: Mapping[str, float]) -> str:
    """Return the report's section of alarms as HTML.

    prompt_shares: result of the prompt check at the start, {dimension: share}; empty if it was not made.
    """
    if alarms is None:
        return ""
    body = "".join(
        f'<p><b class="worse">{escape(_TITLES.get(alarm["kind"], alarm["kind"]))}</b>, step {alarm["step"]}: '
        f"{escape(alarm['text'])}.</p>"
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
