"""What processes do that hold slices of the same videos, for comparison with one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import zero_runs
from torch import Tensor

from vpo_engine.distributed.processes import Processes

SETTINGS = ("pairs_per_step=2", "rollout.candidates=4")
"""The second of two prompts is a tie."""


def divided(sequence: int, *more: str) -> tuple[str, ...]:
    return (f"distributed.sequence_parallel={sequence}", *more)


def run_all(
    cases: Mapping[str, Sequence[str]], processes: Processes, *more: str, steps: int = 2
) -> dict[str, Any]:
    """Return what each case's run made; see ``zero_runs.run``."""
    return {
        name: zero_runs.run((*SETTINGS, *settings, *more), processes, steps)
        for name, settings in cases.items()
    }


def keep(folder: Path, sequence: int, per_team: int, cases: Mapping[str, Sequence[str]]) -> None:
    processes = Processes.start("cpu", per_team, sequence=sequence)
    more = (f"processes.per_prompt={per_team}",)
    torch.save(
        run_all(cases, processes, *divided(sequence, *more)),
        folder / f"{processes.rank} of {processes.count}.pt",
    )
    processes.stop()


def kept(folder: Path, count: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank} of {count}.pt", weights_only=True) for rank in range(count)]


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
