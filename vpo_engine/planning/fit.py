"""Which settings would make a run fit, and how many frames would: found by planning with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vpo_engine.config import Config
from vpo_engine.planning.estimate import Plan

Planner = Callable[[Config], Plan]

CHANGES: tuple[tuple[str, Any], ...] = (
    ("rollout.rows", 4),
    ("rollout.rows", 1),
    ("objective.rows", 1),
    ("reward.rows", 1),
    ("memory.decode_frames", 1),
    ("memory.mlp_chunks", 4),
    ("memory.offload", True),
    ("memory.recompute", "block"),
    ("memory.sequential", True),
    ("memory.residency", "phases"),
    ("reference.storage", "bf16"),
    ("reference.storage", "exact8"),
    ("reward.bits", 8),
    ("memory.optimizer_bits", 8),
    ("memory.weights", "stochastic"),
    ("reference.storage", "int8"),
    ("reward.bits", 4),
)
"""Settings that take less memory, in the order of what they cost: first those that change nothing but the order of
the work, then those that compute or copy again, then those that round."""


@dataclass(frozen=True)
class Change:
    """One setting, and the plan with it."""

    name: str
    value: Any
    plan: Plan

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name}={shown}"


def with_setting(config: Config, name: str, value: Any) -> Config | None:
    """The configuration with one more setting; None where it is set so already or excluded by another."""
    section, key = name.split(".")
    values = config.model_dump()
    if values[section][key] == value:
        return None
    values[section][key] = value
    try:
        return Config.model_validate(values)
    except ValueError:
        return None


def fitting_changes(config: Config, planner: Planner) -> Iterator[Change]:
    """Single settings with which the run fits, the cheapest first."""
    for name, value in CHANGES:
        changed = with_setting(config, name, value)
        if changed is not None and not _takes_more(config, name, value):
            plan = planner(changed)
            if plan.fits:
                yield Change(name, value, plan)


def _takes_more(config: Config, name: str, value: Any) -> bool:
    """Whether a number of rows, frames or bits is less already; None is all of them."""
    section, key = name.split(".")
    now = getattr(getattr(config, section), key)
    return key.endswith(("rows", "frames", "bits")) and now is not None and now <= value


CHUNK = 17
"""Frames in a chunk of the VAE."""


def most_frames(config: Config, resolution: str, planner: Planner) -> int:
    """The most frames, in whole chunks of the VAE, with which the run fits at ``resolution``; 0 if not even one chunk.

    Memory grows with the frames in nearly a straight line: two plans give a guess, and more confirm that it fits and
    that a chunk more does not.
    """

    def excess(chunks: int) -> int:
        model = config.model.model_copy(update={"resolution": resolution, "num_frames": CHUNK * chunks})
        plan = planner(config.model_copy(update={"model": model}))
        return plan.peak.total - plan.limit

    one, five = excess(1), excess(5)
    if one > 0:
        return 0
    guess = max(1, int(1 + 4 * -one / (five - one))) if five > one else 5
    while excess(guess) > 0:
        guess -= 1
    while excess(guess + 1) <= 0:
        guess += 1
    return CHUNK * guess
