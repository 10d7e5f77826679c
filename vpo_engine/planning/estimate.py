"""Turn a traced step into a plan: bytes and seconds of every phase on one device, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vpo_engine.config import Config
from vpo_engine.distributed.deepspeed_settings import resolve
from vpo_engine.memory.idle_offload import PartName, needs_of
from vpo_engine.planning.extrapolate import Traced
from vpo_engine.planning.gpus import GIB, Gpu
from vpo_engine.planning.trace import PHASES, PhaseName
from vpo_engine.planning.tracker import Peak

CONTEXT = int(0.6 * GIB)
"""Bytes of CUDA's context with the kernels of torch, cuBLAS and cuDNN, and of their workspaces. This is an estimate:
0.45 to 0.6 GiB are common on A100 and H100 (nvidia-smi of an idle torch process), plus up to 32 MiB for cuBLAS."""

FRAGMENTATION = 0.03
"""Memory that the allocator holds beyond what tensors take, as a share of that: blocks that do not fit into gaps. This
is an estimate for runs whose shapes do not change from step to step."""

MATRIX_EFFICIENCY, TRAFFIC_EFFICIENCY = 0.75, 0.8
"""Estimated shares of the measured rate of matrix products, and of the bandwidth, that a whole network reaches."""

BUCKET = 128 * 2**20
"""Bytes of gradients that data parallelism averages at once (vpo_engine/distributed/processes.py)."""

LIVE = 10**9
"""Weights that ZeRO's stage 3 keeps whole at once: DeepSpeed's default of stage3_max_live_parameters."""

COMPUTED = ("activations", "workspace")
"""Categories of memory that operators allocate."""

_PARTS: tuple[PartName, ...] = ("policy", "reference", "optimizer", "ema", "vae", "reward", "judge")
"""The parts that are moved. A plan calls the policy "weights", and the others by their names."""


@dataclass(frozen=True)
class PhasePlan:
    """The plan of one phase on one device.

    bytes: taken on the device at the phase's peak, by category; "allowance" is context and fragmentation. host: pinned
    memory of offloaded activations. flops, seconds: of one step (the text's: of one batch); seconds None where
    rates are not known.
    """

    name: PhaseName
    bytes: Mapping[str, int]
    host: int
    flops: float
    seconds: float | None

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def largest(self) -> str:
        """Return the category that takes the most memory, apart from the allowance."""
        return max((name for name in self.bytes if name != "allowance"), key=lambda name: self.bytes[name])


@dataclass(frozen=True)
class Plan:
    """The plan of a step on one device. limit: bytes that the run may take. limited_by: what sets the limit."""

    phases: tuple[PhasePlan, ...]
    limit: int
    limited_by: str
    gpu: Gpu | None
    notes: tuple[str, ...]
    before: frozenset[PhaseName] = frozenset({"text"})
    """The phases that are made once, before the first step."""

    @property
    def peak(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.limit

    @property
    def seconds(self) -> float | None:
        """Return the seconds of one step; None where rates are not known."""
        each = [phase.seconds for phase in self.phases if phase.name not in self.before]
        return (
            None
            if any(value is None for value in each)
            else sum(value for value in each if value is not None)
        )


def estimate(
    config: Config, trace: Traced, gpu: Gpu | None, limit: int, limited_by: str, processes: int = 1
) -> Plan:
    """Return the plan of a traced step on ``gpu``; None is the CPU, which has no context of its own."""
    phases = tuple(_phase(config, trace, name, gpu, processes) for name in PHASES if name in trace.names)
    before: set[PhaseName] = {"text"}
    if config.samples_before:
        before |= {"rollout", "decode", "reward"}
    return Plan(phases, limit, limited_by, gpu, tuple(trace.notes), frozenset(before))


def _phase(config: Config, trace: Traced, name: PhaseName, gpu: Gpu | None, processes: int) -> PhasePlan:
    absent = {"host"}
    if config.memory.offload_idle and gpu is not None:
        needs = needs_of(config)
        staying = {"reward"} if config.reward.process else set()
        phase = "reward_gradient" if config.card.reward_gradient and name in ("rollout", "update") else name
        absent |= {part for part in _PARTS if phase not in needs[part].phases} - staying
    left_out = frozenset("weights" if part == "policy" else part for part in absent)
    found = trace.peak(name, left_out)
    if config.distributed.engine == "deepspeed":
        found = _divided(config, found, name, gpu is not None, processes)
    elif processes > 1 and name == "optimizer":
        found = found | {"exchange": min(BUCKET, found.get("gradients", 0))}
    if name == "rollout" and config.rollout.overlap and gpu is not None:
        found = _with_scoring(found, trace, left_out)
    allowance = 0 if gpu is None else CONTEXT + int(FRAGMENTATION * sum(found.values()))
    seconds = None
    if gpu is not None and gpu.flops is not None and gpu.bandwidth is not None:
        seconds = trace.flops(name) / (MATRIX_EFFICIENCY * gpu.flops)
        seconds += trace.traffic(name) / (TRAFFIC_EFFICIENCY * gpu.bandwidth)
    return PhasePlan(name, {**found, "allowance": allowance}, trace.host(name), trace.flops(name), seconds)


def _divided(config: Config, found: Peak, name: PhaseName, on_gpu: bool, processes: int) -> Peak:
    """Return a phase's peak in one of ``processes`` processes among which DeepSpeed's ZeRO divides a run.

    From stage 1 on there is a float32 copy of the trained weights beside float32 weights, divided as the moments are.
    Gradients are exchanged through two buckets, gathered weights through one. With stage 3 a process keeps up to
    stage3_max_live_parameters weights whole during the update, beside its part.
    """
    zero = resolve(config, processes)["zero_optimization"]
    offloads, found = zero["offload_optimizer"]["device"] == "cpu" and on_gpu, dict(found)
    whole_weights = found.get("weights", 0)
    if processes > 1 and name in ("update", "optimizer"):
        buckets = 2 * zero["reduce_bucket_size"] if name == "update" else zero["allgather_bucket_size"]
        found["exchange"] = min(4 * buckets, 2 * found.get("gradients", 0))
    if zero["stage"] >= 1 and "optimizer" in found:
        copies = (
            found.get("weights", 0) if config.memory.weights == "float32" and config.model.lora is None else 0
        )
        found["optimizer"] = 0 if offloads else (found["optimizer"] + copies) // processes
        found["ema"] = found.get("ema", 0) // processes
    if zero["stage"] >= 2 and "gradients" in found:
        found["gradients"] //= processes
    whole = name in ("rollout", "decode", "reward")
    if zero["stage"] == 3 and "weights" in found and not whole and config.model.lora is None:
        found["weights"] //= processes
        if processes > 1 and name == "update":
            width = 4 if config.memory.weights == "float32" else 2
            live = zero.get("stage3_max_live_parameters", LIVE)
            found["weights"] += min(whole_weights, width * live)
    return found


def _with_scoring(rollout: Peak, trace: Traced, absent: frozenset[str]) -> Peak:
    """Return the rollout's peak while the previous group is decoded or scored at the same time."""
    peaks = [trace.peak(name, absent) for name in ("decode", "reward") if name in trace.names]
    beside = max((sum(peak.get(part, 0) for part in COMPUTED) for peak in peaks), default=0)
    return {**rollout, "activations": rollout.get("activations", 0) + beside}
