"""Settings of the disk."""

from __future__ import annotations

from pydantic import Field

from vpo_engine.config.section import Section


class DiskConfig(Section):
    """The room that a run may take on the disk of its run directory."""

    limit_gib: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Largest size of the run directory in GiB; null: as much as its disk has. A run that will need more is refused at
    its start. One that comes near the limit later is saved and stopped; the same command goes on with it once this
    limit is raised. Nothing is deleted to stay below it."""
