"""``summary.json``, the result of a run, as everything reads it that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpo_engine.runs.readable import readable
from vpo_engine.texts import read_json

_NUMBERS = ("before", "after", "difference")
_LARGEST = 1e100
"""No measure, and no number of seconds, comes near it; larger ones are no float where they are squared."""


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of a run. Raise ValueError, naming the file, unless it is one that a run wrote."""
    with readable(path, "remove it; a run that is resumed writes it again when it ends"):
        summary: dict[str, Any] = read_json(path)
        if type(summary["clips"]) is not int or summary["clips"] < 1:
            raise ValueError(f"clips is {summary['clips']!r}")
        for name, numbers in summary["measures"].items():
            _check_measure(name, numbers)
        for name, seconds in summary["timings"].items():
            _check_number(f"timings.{name}", seconds)
            if seconds < 0:
                raise ValueError(f"timings.{name} is {seconds}")
        if "ema_decay" in summary:
            _check_number("ema_decay", summary["ema_decay"])
    return summary


def _check_measure(name: str, numbers: Mapping[str, Any]) -> None:
    for key in (*_NUMBERS, *(["relative"] if "relative" in numbers else [])):
        _check_number(f"{key} of {name}", numbers[key])
    if "relative" in numbers and not numbers["before"] > 0:
        raise ValueError(f"{name} is compared with a base of {numbers['before']}")
    if numbers["low"] is None and numbers["high"] is None:
        return
    for key in ("low", "high"):
        _check_number(f"{key} of {name}", numbers[key])
    if numbers["low"] > numbers["high"]:
        raise ValueError(f"the bounds of {name} are {numbers['low']} and {numbers['high']}")


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise TypeError(f"{name} is {value!r}")
