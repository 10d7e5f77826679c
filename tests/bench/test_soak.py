"""The soak: it sees leaks of every kind, and in a few hundred steps of a real run there is none."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import soak

LEAKS = {
    "blocks": 1,
    "allocated": 3000,
    "resident": 4000,
    "handles": 0.01,
    "threads": 0.01,
    "traffic": 10,
    "processor": 4e-6,
}
"""What a step leaves behind; of traffic and time, what each step takes more than the one before."""
STEPS = 5000


def counts(leaks: dict[str, float]) -> list[soak.Count]:
    """The counts of a healthy start, with noise, and what leaks at every step."""
    draw = random.Random(0)
    found = []
    for step in range(soak.EVERY // 2, STEPS, soak.EVERY):
        one = soak.Count(
            step,
            blocks=500_000 + draw.randrange(100),
            allocated=300_000_000 + draw.randrange(100_000),
            resident=700_000_000 + draw.randrange(500_000),
            handles=20,
            threads=5,
            traffic=40_000 * step,
            processor=0.02 * step,
            clock=0.03 * step,
        )
        for name, rate in leaks.items():
            grown = rate * step * step / 2 if name in ("traffic", "processor") else int(rate * step)
            one = replace(one, **{name: getattr(one, name) + grown})
        found.append(one)
    return found


def test_a_healthy_run_has_no_fault() -> None:
    assert soak.judge([counts({}), counts({})], 2 * STEPS) == []


@pytest.mark.parametrize(("name", "rate"), LEAKS.items(), ids=LEAKS)
def test_a_leak_is_seen(name: str, rate: float) -> None:
    (fault,) = soak.judge([counts({}), counts({name: rate})], 2 * STEPS)
    assert fault.startswith(f"start 2: {name} grows by ")


@pytest.mark.long
def test_some_hundred_steps_leave_nothing_behind(tmp_path: Path) -> None:
    """A leak of two objects, or of 1 kB, at every step is seen; also one of the process that goes on."""
    starts = soak.soak(tmp_path, 900, "own")
    assert [len(each) for each in starts] == [9, 9]
    assert soak.judge(starts, 900) == []
    assert (tmp_path / "run" / "report.html").is_file()
