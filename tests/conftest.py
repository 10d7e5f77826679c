"""Shared by the tests of whole runs: the sprites world at its smallest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

if (
    "PYTEST_XDIST_WORKER_COUNT" in os.environ
):  # before torch: each worker, and what it starts, takes its share of cores
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

sys.path.insert(
    0, str(Path(__file__).parent.parent / "bench")
)  # as pytest does for the benchmarks themselves

import pytest

from vpo_engine.config import Config
from vpo_engine.config_file import load_config

SMALL = (
    "steps=4",
    "pairs_per_step=2",
    "rollout.candidates=2",
    "rollout.steps=2",
    "objective.draws=2",
    "optimizer.warmup_steps=0",
    "reference.refresh_every=3",
    "evaluation.prompts=2",
    "evaluation.samples_per_prompt=1",
    "evaluation.samples_between=1",
    "evaluation.every=2",
    "checkpoint.every=2",
)


@pytest.fixture(scope="session")
def smallest() -> list[str]:
    """The overrides that make the sprites run one of seconds."""
    return list(SMALL)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    """A sprites configuration of seconds, in its own run directory; arguments override settings."""

    def make(*overrides: str) -> Config:
        return load_config(None, [*SMALL, f"run_dir={tmp_path / 'run'}", *overrides])

    return make
