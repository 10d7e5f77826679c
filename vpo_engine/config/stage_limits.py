"""Settings of the watchdog, which ends a run that hangs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vpo_engine.config.section import Section


class StageLimits(Section):
    """The time that a stage may take before the run is ended."""

    stage_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Minutes that one stage of a step may take in one process (stages are text, rollout, decode, reward, update,
    refresh, evaluate and checkpoint). Then the run ends with exit code 124 and names rank, host, stage and step. auto:
    on GPUs ten times the longest time that the stage has taken so far, and at least 30 minutes; a stage that has never
    ended has no limit, and on CPUs none has. null: no limits."""
