"""Plans as text and as JSON."""

from __future__ import annotations

from typing import Any

from vpo_engine.planning.estimate import Plan
from vpo_engine.planning.gpus import GIB

_COLUMNS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "reference": ("reference",),
    "VAE, reward": ("vae", "reward", "text encoder"),
    "activations": ("activations", "workspace"),
    "other": ("other",),
    "allowance": ("allowance",),
}


def table(plan: Plan) -> str:
    """A line per phase: GiB at its peak by category, operations, seconds, share of the step."""
    header = ["phase", "peak GiB", *_COLUMNS, "TFLOP", "seconds", "share"]
    lines = [header]
    for phase in plan.phases:
        columns = [
            _gib(sum(phase.bytes.get(name, 0) for name in names)) for names in _COLUMNS.values()
        ]
        seconds = "?" if phase.seconds is None else f"{phase.seconds:.3g}"
        share = ""
        if phase.name != "text" and phase.seconds is not None and plan.seconds:
            share = f"{phase.seconds / plan.seconds:.1%}"
        lines.append([phase.name, _gib(phase.total), *columns, f"{phase.flops / 1e12:.4g}", seconds, share])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def verdict(plan: Plan) -> str:
    """Peak, what dominates it, whether it fits."""
    peak = plan.peak
    fits = "fits in" if plan.fits else "does not fit in"
    return (
        f"peak {_gib(peak.total)} GiB in {peak.name}, most of it {peak.largest} ({_gib(peak.bytes[peak.largest])} GiB): "
        f"{fits} {_gib(plan.limit)} GiB ({plan.limited_by})"
    )


def as_json(plan: Plan) -> dict[str, Any]:
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


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
