"""The watch in the middle of several failures at once: all of its sums go on after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable

from test_step_watch import monitor_of, synthetic

CHANGES: dict[str, Callable[[int], float]] = {
    "watch/motion": lambda since: -0.8,
    "watch/brightness": lambda since: 20.0,
    "watch/prompt_share": lambda since: -0.38,
    "winner_error_change": lambda since: 0.05,
    "loser_error_change": lambda since: 0.06,
}


def test_sums_that_have_risen_are_those_of_a_watch_that_never_stopped() -> None:
    rows, cut = synthetic(6, 14, **CHANGES), 9
    whole, first, second = monitor_of(rows), monitor_of(rows), monitor_of([])
    expected = [whole.step(row["step"], row) for row in rows[1:]]
    for row in rows[1:cut]:
        first.step(row["step"], row)
    state = json.loads(json.dumps(first.state()))
    watch = state["watch"]
    drifts = (watch["motion"], "-"), (watch["share"], "-"), (watch["looks"]["brightness"], "+")
    assert min(watch["shortcut"][0], *(drift["sums"][way][0] for drift, way in drifts)) > 0
    second.load(state)
    assert [second.step(row["step"], row) for row in rows[cut:]] == expected[cut - 1 :]
