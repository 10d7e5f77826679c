"""One account of a run's time, for the terminal, the report and ``summary.json``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

STAGES = {
    "text": "the text encoder embeds the prompts",
    "rollout": "the policy samples candidates for each prompt",
    "decode": "the VAE decodes the candidates' latents to videos",
    "reward": "the reward model scores the candidates",
    "update": "the policy is trained on pairs of the best and the worst candidate",
    "refresh": "the reference is set to the policy",
    "evaluate": "the policy samples held-out prompts, and the videos are scored",
    "checkpoint": "a checkpoint is saved",
    "other": "outside all stages",
}
"""What happens in each stage, in order."""
_WHOLE = "step"
"""The entry of the timings, and of the rows' ``seconds/...``, that is the total; no stage has all of it."""
_LEAST_SHARE = 0.001


@dataclass(frozen=True)
class TimeAccount:
    """The seconds of a run: ``parts`` by stage, which add up to ``whole``."""

    whole: float
    parts: Mapping[str, float]


def account(timings: Mapping[str, float]) -> TimeAccount:
    """Divide the timings of ``summary.json`` into parts. What no stage accounts for is the part "other"."""
    staged = {name: seconds for name, seconds in timings.items() if name != _WHOLE and seconds > 0}
    known = math.fsum(staged.values())
    whole = max(known, timings.get(_WHOLE, 0.0))
    if whole - known > _LEAST_SHARE * whole:
        staged["other"] = whole - known
    order = [*(name for name in STAGES if name in staged), *(name for name in staged if name not in STAGES)]
    return TimeAccount(whole, {name: staged[name] for name in order})


def sum_rows(rows: Iterable[Mapping[str, int | float | str]]) -> dict[str, float]:
    """Add up the ``seconds/...`` of train rows, which gives timings as those of ``summary.json``."""
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds/"):
                stage = name.removeprefix("seconds/")
                total[stage] = total.get(stage, 0.0) + float(value)
    return total


def format_account(timings: Mapping[str, float], width: int = 79) -> str:
    """Say how long a run took and of which parts that is made; parts that round to 0.0 s are left out."""
    found = account(timings)
    parts = ", ".join(
        f"{name} {format_duration(seconds)}" for name, seconds in found.parts.items() if seconds >= 0.05
    )
    text = f"Time: {format_duration(found.whole)} in all: {parts}"
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


def format_duration(seconds: float) -> str:
    """Format a duration with a tenth of a second, or as ``format_seconds`` from a minute on."""
    return f"{seconds:.1f} s" if seconds < 59.95 else format_seconds(seconds)


def format_seconds(seconds: float) -> str:
    """Format a duration: 4 s, 2 min 05 s, 3 h 07 min, 2 d 03 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
