"""The table of an evaluation in the terminal: nothing of it is lost where it is narrow."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import Any

from vpo_engine.evaluation.page import _header, _shown, _table
from vpo_engine.evaluation.paired import compare_pairs
from vpo_engine.evaluation.table import format_results

WIDE = "Temporal consistency of a reward with a long name"


SETTINGS = {"prompts": {"count": 8}, "frames": 17, "height": 32, "width": 32, "fps": 8, "same_noise": True}


def entry(label: str, numbers: tuple[float, float], compared: bool) -> dict[str, Any]:
    """Return a measure whose change is nearly the same for all of eight prompts, or one of all videos together."""
    base, policy = numbers
    pairs = {f"prompt {n}": [(base, policy + 1e-9 * n)] for n in range(8)}
    found = compare_pairs(pairs, 1) if compared else None
    return {
        "label": label,
        "unit": "",
        "group": "reward",
        "metric": "reward:builtin",
        "better": 1,
        "policy": {"value": policy, "provenance": {"count": 8}},
        "baseline": {"value": base, "provenance": {"count": 8}},
        "comparison": None if found is None else {**dataclasses.asdict(found), "p_holm": 0.25},
        "failed": {"policy": {}, "baseline": {}},
    }


def said(*entries: dict[str, Any], arms: Sequence[str] = ("policy", "baseline")) -> list[str]:
    arm = {"label": "runs/a", "videos": 8}
    return format_results(
        {
            "arms": dict.fromkeys(arms, arm),
            "settings": SETTINGS,
            "measures": {str(number): one for number, one in enumerate(entries)},
            "proxies": {},
            "statistics": "",
            "unloaded": {},
            "problems": {},
            "partial": False,
        }
    ).splitlines()


def test_long_labels_stand_above_their_numbers_in_eighty_columns() -> None:
    lines = said(entry(WIDE, (-0.4482742, -0.4482920), True), entry("FVD", (12.5, 11.25), False))
    assert max(map(len, lines)) < 80
    numbers = lines[lines.index(f" {WIDE}") + 1].split()
    assert numbers[:3] == ["-0.44827", "-0.44829", "-0.00002"]
    assert numbers[-4:] == ["0", "%", "0.250", "worse"]
    below = lines[lines.index(" FVD: one number for all videos") + 1]
    assert below.split() == ["12.5000", "11.2500"]


def test_few_numbers_stand_beside_their_label() -> None:
    lines = said(entry(WIDE, (0.5, 0.75), False), arms=["policy"])
    assert f" {WIDE}  0.7500       8" in lines


def test_the_page_tells_baseline_and_policy_apart_and_counts_what_is_better() -> None:
    pairs = {"A": (1.0, 2.0), "B": (1.0, 3.0), "C": (1.0, 0.5)}
    results = {
        "arms": {role: {"label": "runs/a", "videos": 8} for role in ("policy", "baseline")},
        "settings": SETTINGS,
        "measures": {name: entry(name, pair, True) | {"meaning": ""} for name, pair in pairs.items()},
        "proxies": {"D": entry("D", (1.0, 2.0), True) | {"meaning": "", "group": "proxy"}},
        "statistics": "",
        "partial": False,
    }
    said = html.unescape(_header(results))
    assert "2 of 3 measures are better than the baseline's, 1 worse" in said
    cells = re.findall(r'data-head="(baseline|policy)">([\d.]+)<', _table(results))
    assert [(head, float(value)) for head, value in cells[:2]] == [("baseline", 1.0), ("policy", 2.0)]


def test_rows_are_spread_over_the_first_measure_that_single_videos_have() -> None:
    """FVD is one number of all videos, and would tell no row from another."""
    rows = [
        {"prompt": "a", "index": number, "policy": {"values": {"sharpness": float(number % 200)}}}
        for number in range(400)
    ]
    results = {"arms": {"policy": {}}, "measures": {"fvd": {}, "sharpness": {}}, "proxies": {}}
    shown = [row["policy"]["values"]["sharpness"] for row in _shown(rows, results)]
    assert (min(shown), max(shown)) == (0.0, 199.0)
    assert len(shown) == len({*shown}) == 120
