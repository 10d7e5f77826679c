"""Settings of the watchdog, which ends a run that hangs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vpo_engine.config.section import Section


class StageLimits(Section):
    """The time that a stage may take before the run is ended."""

    stage_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Minutes that one stage of a step may take in one process without reaching anything (stages are text, rollout,
    decode, reward, update, refresh, evaluate and checkpoint; a pass of the network, a batch of videos and a micro-batch
    are something). Then the run ends with exit code 124 and names rank, host, stage and step. auto: on GPUs ten times
    the longest such time of the stage so far, at least 30 minutes, and at least 180 until it has ended for the first
    time; no limit on CPUs. null: no limits."""
