"""Write plans as text and as JSON."""

from __future__ import annotations

from typing import Any

from vpo_engine.planning.estimate import (
    CONTEXT,
    FRAGMENTATION,
    MATRIX_EFFICIENCY,
    TRAFFIC_EFFICIENCY,
    Plan,
)
from vpo_engine.planning.fit import Change
from vpo_engine.planning.gpus import GIB

_COLUMNS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer", "ema"),
    "reference": ("reference",),
    "VAE, reward": ("vae", "reward", "judge", "text encoder"),
    "activations": ("activations", "workspace"),
    "other": ("other", "exchange", "sampling copy"),
    "allowance": ("allowance",),
}


def table(plan: Plan) -> str:
    """Return a table with a line per phase: GiB at its peak by category, operations, time, share of the step."""
    header = ["phase", "peak GiB", *_COLUMNS, "FLOP", "time", "share"]
    lines = [header]
    for phase in plan.phases:
        columns = [_gib(sum(phase.bytes.get(name, 0) for name in names)) for names in _COLUMNS.values()]
        time = "?" if phase.seconds is None else duration(phase.seconds)
        share = ""
        if phase.name not in plan.before and phase.seconds is not None and plan.seconds:
            share = f"{phase.seconds / plan.seconds:.1%}"
        lines.append([phase.name, _gib(phase.total), *columns, _operations(phase.flops), time, share])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in lines
    )


def verdict(plan: Plan) -> str:
    """Return a sentence: whether the run fits, its peak, its largest part, and the time of a step."""
    peak = plan.peak
    fits = "fits" if plan.fits else "does not fit"
    time = "" if plan.seconds is None else f"; {duration(plan.seconds)} a step"
    return (
        f"{fits} in {_gib(plan.limit)} GiB ({plan.limited_by}): peak {_gib(peak.total)} GiB in {peak.name}, the "
        f"largest part {peak.largest} ({_gib(peak.bytes[peak.largest])} GiB){time}"
    )


def provenance(plan: Plan) -> list[str]:
    """Return lines that say where the numbers come from."""
    lines = [*plan.notes]
    if any(phase.name == "text" for phase in plan.phases):
        lines.append("text is encoded once, before the first step, so that it has no share of a step")
    if "rollout" in plan.before:
        lines.append(
            "pairs are sampled once, before the first step, so that rollout, decode and reward have no share"
        )
    host = max(phase.host for phase in plan.phases)
    if host:
        lines.append(f"host memory for offloaded activations: {_gib(host)} GiB")
    if plan.gpu is not None:
        kind = "measured" if plan.gpu.measured else "estimates, not measured by this project"
        lines.append(
            f"allowance: {_gib(CONTEXT)} GiB for CUDA's context and workspaces, {FRAGMENTATION:.0%} for fragmentation; "
            "both estimates"
        )
        lines.append(
            f"seconds are {kind}: {plan.gpu.source}, at {MATRIX_EFFICIENCY:.0%} of it for matrix products and "
            f"{TRAFFIC_EFFICIENCY:.0%} of the bandwidth for the rest"
        )
    return lines


def whole(plan: Plan) -> str:
    """Return table, provenance and verdict."""
    return "\n".join([table(plan), *provenance(plan), verdict(plan)])


def line(plan: Plan) -> str:
    """Return the plan in one line, for runs on a CPU, whose rates are not known."""
    peaks = ", ".join(f"{phase.name} {_gib(phase.total)}" for phase in plan.phases)
    return f"plan: {peaks} GiB; limit {_gib(plan.limit)} GiB, {plan.limited_by}"


def shortfall(plan: Plan, change: Change | None) -> str:
    """Return the error of a run that is refused: why, and what to do."""
    peak = plan.peak
    remedy = "no single setting makes it fit: see python -m vpo_engine.plan"
    if change is not None:
        remedy = f"it fits with {change} ({_gib(change.plan.peak.total)} GiB)"
    return (
        f"the run needs {_gib(peak.total)} GiB in {peak.name}, the largest part {peak.largest} "
        f"({_gib(peak.bytes[peak.largest])} GiB), and may take {_gib(plan.limit)} GiB ({plan.limited_by}); {remedy}. "
        "To try it all the same, set memory.overcommit=true"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for machines."""
    return {
        "fits": plan.fits,
        "limit_bytes": plan.limit,
        "limited_by": plan.limited_by,
        "peak_phase": plan.peak.name,
        "peak_bytes": plan.peak.total,
        "seconds": plan.seconds,
        "phases": {
            phase.name: {
                "bytes": dict(phase.bytes),
                "peak_bytes": phase.total,
                "host_bytes": phase.host,
                "flops": phase.flops,
                "seconds": phase.seconds,
            }
            for phase in plan.phases
        },
        "notes": list(plan.notes),
    }


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them, with two significant digits."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    if 0 < seconds < 1e-4:
        return "< 0.1 ms"
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms" if seconds else "0"


def _operations(flops: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:,.{0 if flops >= 100 * size else 1}f} {prefix}"
    return "-"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
