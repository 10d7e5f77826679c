"""``alarms.jsonl``: what a run noticed about its reward, for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vpo_engine.runs.directory import RunDirectory

_TITLES = {
    "prompt": "The reward does not read prompts",
    "divergence": "Training reward and held-out reward part",
    "style": "Clips look different",
}


def write_alarms(run: RunDirectory, alarms: Sequence[Mapping[str, Any]]) -> None:
    """All of them, each {"step": int, "kind": str, "text": str}; the file is replaced atomically."""
    unfinished = run.alarms.with_name(f".{run.alarms.name}.tmp")
    unfinished.write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms), encoding="utf-8")
    unfinished.replace(run.alarms)


def read_alarms(run: RunDirectory) -> list[dict[str, Any]] | None:
    """None for a run that did not watch."""
    if not run.alarms.is_file():
        return None
    return [json.loads(line) for line in run.alarms.read_text(encoding="utf-8").splitlines()]


def alarm_section(alarms: Sequence[Mapping[str, Any]] | None, prompt_shares: Mapping[str, float]) -> str:
    """prompt_shares: of the check at the start, {dimension: share}; empty where there was none."""
    if alarms is None:
        return ""
    body = "".join(
        f'<p><b class="worse">{escape(_TITLES[alarm["kind"]])}</b>, step {alarm["step"]}: '
        f"{escape(alarm['text'])}.</p>"
        for alarm in alarms
    )
    if not alarms:
        body = '<p class="soft">None: nothing that is watched says that the reward is exploited.</p>'
    if prompt_shares:
        shares = ", ".join(f"{name.replace('_', ' ')} {share:.2f}" for name, share in prompt_shares.items())
        body += (
            '<p class="soft">Before the first step, share of the base policy\'s clips that score higher with their own '
            f"prompt than with another's: {escape(shares)}. 0 is a dimension that does not read the prompt.</p>"
        )
    return f"<section><h2>Alarms</h2>{body}</section>"
