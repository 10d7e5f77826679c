"""Settings of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vpo_engine.config.section import Section


class CheckpointConfig(Section):
    """Checkpoints, from which a run can be resumed."""

    every: int | None = Field(100, ge=1)
    """Steps between checkpoints; null: only at the end and on SIGTERM."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints that are kept; older ones are removed."""
    background: bool = False
    """Copy the state to host memory and go on training while a thread writes the files. false: training waits until
    they are written. true takes host memory of the size of a checkpoint, in the first process only, and pays where
    checkpoints are frequent or their disk is slow. The files are the same."""
    resume: Literal["auto"] | bool = "auto"
    """Whether to go on with a run that is in the run directory already. auto: go on if it has the same settings and was
    stopped before its last step, as a job that is started again does; a new run_dir begins at the first step. true:
    there must be a run to go on with (without run_dir, the newest of this name under runs/). false: refuse a run
    directory that is not empty."""
    from_: int | Path | None = Field(None, alias="from")
    """Checkpoint to go on from: its step, or its folder. Later checkpoints are removed when the run goes on; what
    torchrun or Slurm starts again goes on from what was saved since. null: the newest complete one."""
