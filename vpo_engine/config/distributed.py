"""Settings of runs on several GPUs and machines."""

from __future__ import annotations

from vpo_engine.config.stage_limits import StageLimits


class DistributedConfig(StageLimits):
    """Runs on several GPUs and machines (see docs/many_machines.md)."""
