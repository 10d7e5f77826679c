"""Summarise how a run changed its held-out measures, with confidence bounds, as tables and sentences.

Every comparison is paired: clip i before training and clip i after it have the same prompt and noise. So the spread of
the differences comes from the training, and not from the differences between clips.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpo_engine.metrics.measures import GROUPS, describe
from vpo_engine.metrics.student_t import student_t_quantile
from vpo_engine.metrics.time_account import format_account

CONFIDENCE = 0.95

WIDTH = 79
"""Most columns of a line in the terminal."""
PLACES = 5
"""Most decimal places in the terminal."""
_PREFIX = "held_out/"


@dataclass(frozen=True)
class Difference:
    """The mean of after - before over n paired clips, with two-sided 95 % bounds (Student's t, n - 1 degrees).

    One clip has no bounds, since nothing tells how much clips differ: ``low`` and ``high`` are None.
    """

    mean: float
    low: float | None
    high: float | None
    before: float
    after: float
    n: int


def paired_difference(before: Tensor, after: Tensor) -> Difference:
    """Compare per-clip values [M], M >= 1, in float64. Raise ValueError for other shapes and non-finite values."""
    if before.dim() != 1 or before.shape != after.shape or len(before) < 1:
        raise ValueError(
            f"a paired comparison needs two vectors of the same length, at least 1, got {list(before.shape)} "
            f"and {list(after.shape)}"
        )
    for name, values in (("before", before), ("after", after)):
        if not torch.isfinite(values).all():
            clip = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(f"the value {name} training of clip {clip} is {values[clip].item()}, not finite")
    before, after = before.double(), after.double()
    differences = (after - before).tolist()
    means = before.mean().item(), after.mean().item()
    if len(before) == 1:
        return Difference(differences[0], None, None, *means, n=1)
    mean, half = _mean_and_half_width(differences)
    return Difference(mean, mean - half, mean + half, *means, n=len(before))


def summarise(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    timings: Mapping[str, float],
    ema_decay: float | None = None,
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    before, after: {measure: [M]}, the same measures, named ``reward/...``, ``judge/...``, ``pixels/...`` (a
    leading ``held_out/`` is dropped). timings: {stage: seconds of the whole run}. ema_decay: of the moving average
    that was evaluated after training; None if it was the policy itself.

    The content is {"clips", "confidence", "measures": {name: {"before", "after", "difference", "low", "high",
    "relative"}}, "timings"}, and "ema_decay" unless it is None; ``relative`` is the difference divided by the base
    value, for pixel measures whose base value is above 0. With one clip ``low`` and ``high`` are None.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(f"measures must be the same before and after; only one side has: {', '.join(odd)}")
    if not before:
        raise ValueError("there is no held-out measure to summarise")
    measures: dict[str, dict[str, Any]] = {}
    clips: set[int] = set()
    for name in after:  # a resumed run has read ``before`` from a file, which sorts the names
        try:
            found = paired_difference(before[name], after[name])
        except ValueError as error:
            raise ValueError(f"measure '{name}': {error}") from error
        clips.add(found.n)
        measures[name.removeprefix(_PREFIX)] = {
            "before": found.before,
            "after": found.after,
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
        }
    if len(clips) > 1:
        raise ValueError(
            f"every measure must have a value for each clip, got numbers of clips {sorted(clips)}"
        )
    for name, numbers in measures.items():
        if name.startswith("pixels/") and numbers["before"] > 0:
            numbers["relative"] = numbers["difference"] / numbers["before"]
    return {
        "clips": clips.pop(),
        "confidence": CONFIDENCE,
        "measures": measures,
        "timings": {name: float(seconds) for name, seconds in timings.items()},
        **({} if ema_decay is None else {"ema_decay": ema_decay}),
    }


def change(measure: str, numbers: Mapping[str, Any]) -> str:
    """Return "better" or "worse" if the bounds exclude zero ("changed" if no direction is better), else "unclear".

    Without bounds it is "unclear".
    """
    if numbers["low"] is None or numbers["low"] <= 0 <= numbers["high"]:
        return "unclear"
    sign = describe(measure).better * (1 if numbers["low"] > 0 else -1)
    return {1: "better", -1: "worse", 0: "changed"}[sign]


def number_texts(numbers: Mapping[str, Any], most: int = 8) -> tuple[str, str, str, str]:
    """Format base, final, difference and [low, high], with as many digits as the width of the bounds justifies.

    most: the greatest number of decimal places.
    """
    places = _places(numbers, most)
    return (
        f"{numbers['before']:.{places}f}",
        f"{numbers['after']:.{places}f}",
        f"{numbers['difference']:+.{places}f}",
        bounds_text(numbers, places),
    )


def change_text(measure: str, numbers: Mapping[str, Any]) -> str:
    """Return ``change`` as people read it: "not clear" if the bounds include zero, "no bounds" for one clip."""
    if numbers["low"] is None:
        return "no bounds"
    word = change(measure, numbers)
    return "not clear" if word == "unclear" else word


def relative_text(numbers: Mapping[str, Any]) -> str:
    """Format the change as a share of the base value; "" for measures without one."""
    if "relative" not in numbers:
        return ""
    percent = 100 * numbers["relative"]
    return f"{percent:+.1f} %" if abs(percent) < 99.95 else f"{percent:+.0f} %"


def bounds_text(
    numbers: Mapping[str, Any], places: int, form: str = "[{}, {}]", without: str = "none"
) -> str:
    """Format the bounds of a measure, or return ``without`` for one clip, which has none."""
    if numbers["low"] is None:
        return without
    return form.format(f"{numbers['low']:+.{places}f}", f"{numbers['high']:+.{places}f}")


def headline(summary: Mapping[str, Any]) -> str:
    """Say in a few words how the held-out reward and the judge changed."""
    found = {
        kind: change(f"{kind}/selected", summary["measures"][f"{kind}/selected"])
        for kind in ("reward", "judge")
        if f"{kind}/selected" in summary["measures"]
    }
    words = {"better": "is better", "worse": "is worse", "unclear": "shows no clear change"}
    if not found:
        return "Held-out reward was not measured"
    if len(set(found.values())) == 2:
        return f"Held-out reward {words[found['reward']]}, the judge {words[found['judge']]}"
    if summary["clips"] == 1:
        return "One held-out clip, which cannot tell a change from chance"
    who = "Held-out reward and judge" if len(found) == 2 else f"Held-out {next(iter(found))}"
    plural = {"better": "are better", "worse": "are worse", "unclear": "show no clear change"}
    return f"{who} {(plural if len(found) == 2 else words)[next(iter(found.values()))]}"


def verdict(summary: Mapping[str, Any]) -> str:
    """Describe the changes in one paragraph."""
    measures = summary["measures"]
    parts = []
    if "ema_decay" in summary:
        parts.append(
            f"The final videos are those of the policy's moving average (ema.decay={summary['ema_decay']:g})."
        )
    for name, label in (("reward/selected", "Held-out reward"), ("judge/selected", "Judge")):
        if name in measures:
            words = {"better": "improved", "worse": "got worse", "unclear": "no clear change"}
            numbers = measures[name]
            said = f"{words[change(name, numbers)]} ({numbers['difference']:+.3f}, 95 % bounds {{}} to {{}})"
            without = f"{numbers['difference']:+.3f} on one clip, which has no bounds"
            parts.append(f"{label}: {bounds_text(numbers, 3, said, without)}.")
    for name in ("pixels/jitter", "pixels/colour_change", "pixels/displacement"):
        if name in measures and "relative" in measures[name]:
            unclear = " (no bounds)" if measures[name]["low"] is None else " (bounds include zero)"
            doubt = unclear if change(name, measures[name]) == "unclear" else ""
            parts.append(f"{describe(name).label} {_than_before(measures[name]['relative'])}{doubt}.")
    return " ".join(parts) if parts else "No held-out reward was measured."


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the table that a run prints at its end: a line per measure, then the timings and the ``verdict``.

    It fits 80 columns as long as the numbers have fewer than nine characters.
    """
    measures = summary["measures"]
    rows = [("", "base", "final", "change", "± 95 %", "of base", "")]
    group = ""
    for name, numbers in measures.items():
        kind = name.partition("/")[0]
        if kind != group:
            group = kind
            rows.append((f"{GROUPS.get(kind, kind)}:", "", "", "", "", "", ""))
        base, final, difference, _ = number_texts(numbers, PLACES)
        relative = relative_text(numbers)
        label = f" {describe(name, measures).title}"
        rows.append(
            (label, base, final, difference, _half_width(numbers), relative, change_text(name, numbers))
        )
    lines = [*_wrapped(_heading(summary["clips"])), "", *aligned(rows), ""]
    if summary["timings"]:
        lines += [format_account(summary["timings"], WIDTH), ""]
    return "\n".join([*lines, *_wrapped(verdict(summary))])


def summarise_seeds(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the summaries of runs that differ in their seed only. The unit is the run, not the clip.

    Return {"seeds": S, "measures": {name: {"before", "after", "difference": means over seeds, "sd": standard deviation
    of the difference over seeds (n - 1), "low", "high": 95 % bounds over seeds, "improved": number of seeds that are
    better by their own bounds, "each": [difference per seed]}}}. With one seed "sd" and the bounds are left out.
    """
    if not summaries:
        raise ValueError("there is no summary to combine; give one for each seed")
    names = list(summaries[0]["measures"])
    for summary in summaries[1:]:
        if odd := sorted(set(summary["measures"]) ^ set(names)):
            raise ValueError(f"every seed must have the same measures; only some have: {', '.join(odd)}")
    measures = {name: _over_seeds(name, [s["measures"][name] for s in summaries]) for name in names}
    return {"seeds": len(summaries), "measures": measures}


def format_seeds(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Format results of ``summarise_seeds`` in columns, e.g. {"online": ..., "offline": ...}: mean change ± sd."""
    if not groups:
        raise ValueError("there is no group of seeds to print")
    names = list(dict.fromkeys(name for group in groups.values() for name in group["measures"]))
    heads = [
        f"{label} ({group['seeds']} seed{'s' if group['seeds'] > 1 else ''})"
        for label, group in groups.items()
    ]
    rows = [("measure", *heads)]
    for name in names:
        cells = []
        for group in groups.values():
            numbers = group["measures"].get(name)
            if numbers is None:
                cells.append("-")
                continue
            spread = f" ± {numbers['sd']:.3f}" if "sd" in numbers else ""
            cells.append(f"{numbers['difference']:+.3f}{spread}  {numbers['improved']}/{group['seeds']}")
        kind = name.partition("/")[0]
        rows.append((f"{GROUPS.get(kind, kind)}: {describe(name, names).title.lower()}", *cells))
    note = (
        "Mean change over seeds ± its standard deviation; then the number of seeds that improved by their own 95 % "
        "bounds."
    )
    return "\n".join([*_wrapped(note), "", *aligned(rows)])


def _mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of at least two values and the half width of its confidence interval."""
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, student_t_quantile((1 + CONFIDENCE) / 2, n - 1) * sd / math.sqrt(n)


def _places(numbers: Mapping[str, Any], most: int) -> int:
    return places_for(numbers["low"], numbers["high"], most)


def places_for(low: float | None, high: float | None, most: int = 8) -> int:
    """Return how many decimal places, at most ``most``, the width of the bounds justifies."""
    width = 0.0 if low is None or high is None else high - low
    return min(most, max(3, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def _half_width(numbers: Mapping[str, Any]) -> str:
    """Format the distance of either bound from the change."""
    if numbers["low"] is None:
        return "none"
    return f"{(numbers['high'] - numbers['low']) / 2:.{_places(numbers, PLACES)}f}"


def _heading(clips: int) -> str:
    if clips == 1:
        return (
            "1 held-out clip, the same prompt and noise before and after. It has no bounds: give a second prompt, or "
            "evaluation.samples_per_prompt=2"
        )
    return f"{clips} held-out clips, the same prompts and noise before and after"


def _than_before(relative: float) -> str:
    """Say in words how a measure compares with the base's, for example "is 13 % higher than before"."""
    percent = round(100 * abs(relative))
    if percent == 0:
        return "is about the same as before"
    return f"is {percent} % {'higher' if relative > 0 else 'lower'} than before"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _over_seeds(name: str, numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    each = [entry["difference"] for entry in numbers]
    result: dict[str, Any] = {
        key: math.fsum(entry[key] for entry in numbers) / len(numbers)
        for key in ("before", "after", "difference")
    }
    if len(each) > 1:
        mean, half = _mean_and_half_width(each)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in each) / (len(each) - 1))
        result |= {"sd": sd, "low": mean - half, "high": mean + half}
    improved = sum(change(name, entry) == "better" for entry in numbers)
    return result | {"improved": improved, "each": each}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first and last column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([first, *rest, row[-1]]).rstrip())
    return lines
