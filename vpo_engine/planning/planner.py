"""Plan a run on a device, and decide whether it may start."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from vpo_engine.config import (
    CheckpointConfig,
    Config,
    DiskConfig,
    DistributedConfig,
    EvaluationConfig,
    GuardsConfig,
    LogConfig,
    PairsConfig,
    PromptsConfig,
)
from vpo_engine.disk_plan import describe
from vpo_engine.planning.disk import planned_disk
from vpo_engine.planning.estimate import Plan, estimate
from vpo_engine.planning.extrapolate import Traced, traced
from vpo_engine.planning.fit import fitting_changes, with_granted_batch_size
from vpo_engine.planning.gpus import GIB, Gpu, present_gpu
from vpo_engine.planning.presets import resolve_presets
from vpo_engine.planning.report import line, shortfall, whole


def plan_run(config: Config, gpu: Gpu | None, processes: int = 1) -> Plan:
    """Return the plan of one of ``processes`` processes on ``gpu``, or on this machine's CPU for None.

    Its limit is memory.limit_gib, else the GPU's capacity or the memory that this machine has available.
    """
    if config.rollout.batch_size == "auto" and config.card.candidates:
        config = granted(config, gpu, processes)
        plan = plan_run(config, gpu, processes)
        note = f"rollout.batch_size=auto grants {_at_once(config.rollout.batch_size)}"
        return replace(plan, notes=(*plan.notes, note))
    given = config.memory.limit_gib
    if given is not None:
        limit, limited_by = int(given * GIB), f"memory.limit_gib={given:g}"
    elif gpu is not None:
        limit, limited_by = gpu.capacity, f"what {gpu.name} has"
    else:
        limit, limited_by = available_memory(), "what this machine has available"
    trace = _trace(_as_traced(config), gpu is not None, processes)
    return estimate(config, trace, gpu, limit, limited_by, processes)


def granted(config: Config, gpu: Gpu | None, processes: int = 1) -> Config:
    """Replace rollout.batch_size=auto by the number that the plan on ``gpu`` (None: this CPU) grants."""
    return with_granted_batch_size(config, lambda changed: plan_run(changed, gpu, processes), processes)


def check_fits(
    config: Config,
    device: torch.device,
    processes: int = 1,
    agree: Callable[[str], str] = str,
    prompts: int | None = None,
) -> tuple[Config, str]:
    """Return the configuration with its presets resolved and its batch size granted, and its plan on ``device``.

    The plan is what ``vpo_engine.plan`` prints, or on a CPU a line about memory and one about the disk. ``agree``: see
    ``resolve_presets``. ``prompts``: see ``planned_disk``. Unless
    memory.overcommit is set, a run that does not fit is a ValueError with the phase, the need, the limit, and the
    cheapest single setting that would make it fit.
    """
    gpu = present_gpu() if device.type == "cuda" else None
    config, presets = resolve_presets(config, lambda changed: plan_run(changed, gpu, processes).fits, agree)
    config = granted(config, gpu, processes)
    plan = plan_run(config, gpu, processes)
    if not plan.fits and not config.memory.overcommit:
        changes = fitting_changes(config, plan, lambda changed: plan_run(changed, gpu, processes))
        raise ValueError(shortfall(plan, next(changes, None)))
    size = config.rollout.batch_size
    granted_size = f"; {_at_once(size)}" if size and config.card.candidates else ""
    disk = planned_disk(config, describe, prompts)
    lines = [line(plan) + granted_size, disk] if gpu is None else [disk, whole(plan) + granted_size]
    return config, "\n".join(filter(None, [presets, *lines]))


def _at_once(size: int | Literal["auto"] | None) -> str:
    if size is None:
        return "all candidates at once"
    return "one candidate at a time" if size == 1 else f"{size} candidates at once"


def available_memory() -> int:
    """Return the bytes that new programs can take without swapping (Linux), else 2^63, so that nothing is refused."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return 2**63
    fields = dict(entry.split(":") for entry in path.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@functools.lru_cache(maxsize=64)
def _trace(config: Config, on_gpu: bool, processes: int) -> Traced:
    return traced(config, on_gpu=on_gpu, processes=processes)


def _as_traced(config: Config) -> Config:
    """Return the configuration without settings that do not change the trace, so that traces are shared."""
    memory = config.memory.model_copy(update={"offload_idle": False, "limit_gib": None, "overcommit": False})
    optimizer = config.optimizer.model_copy(update={"lr": 1.0, "warmup_steps": 0, "final_lr": 1.0})
    same = {
        "prompts": PromptsConfig(),
        "pairs": PairsConfig(),
        "optimizer": optimizer,
        "guards": GuardsConfig(reward=config.guards.reward),
        "evaluation": EvaluationConfig(),
        "checkpoint": CheckpointConfig(),
        "log": LogConfig(),
        "distributed": DistributedConfig(sequence_parallel=config.distributed.sequence_parallel),
        "disk": DiskConfig(),
        "seed": 0,
    }
    return config.model_copy(update={"memory": memory, "name": "", "run_dir": None, "steps": 10**9, **same})
