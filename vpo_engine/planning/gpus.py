"""The memory and the speed of GPUs, as far as they are known."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GIB = 2**30
DEFAULT = "a100-80g"


@dataclass(frozen=True)
class Gpu:
    """A kind of device.

    capacity: bytes that torch reports as its total memory. flops: bf16 matrix products with float32 sums, per second,
    as measured on large products; bandwidth: bytes per second. None where unknown. measured: whether this project
    measured the rates.
    """

    name: str
    capacity: int
    flops: float | None
    bandwidth: float | None
    source: str
    measured: bool = False


MAMF = "largest measured rate of matrix products, stas00/ml-engineering, compute/accelerator"
DATASHEET = "80 % of the datasheet's dense rate"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", int(39.4 * GIB), 267.9e12, 1.555e12, f"{MAMF} (A100 SXM)"),
        Gpu("a100-80g", int(79.2 * GIB), 267.9e12, 2.039e12, f"{MAMF} (A100 SXM)"),
        Gpu("h100-80g", int(79.1 * GIB), 792.1e12, 3.35e12, f"{MAMF} (H100 SXM)"),
        Gpu("h200", int(139.7 * GIB), 794.5e12, 4.8e12, f"{MAMF} (H100 and H200 SXM)"),
        Gpu("b200", int(178.3 * GIB), 1745e12, 8.0e12, f"{MAMF} (B200)"),
        Gpu("l40s", int(44.4 * GIB), 0.8 * 362e12, 0.864e12, f"{DATASHEET} (362 TFLOPS)"),
        Gpu("rtx4090", int(23.6 * GIB), 0.8 * 165.2e12, 1.008e12, f"{DATASHEET} (165 TFLOPS, float32 sums)"),
    )
}
"""Rates are others' measurements or estimates until a row here says ``measured``. Bandwidths are the datasheets'.
Capacities are what torch.cuda reports on such devices; their labels are rounded up."""

_NAMES = {
    "A100": ("a100-40g", "a100-80g"),
    "H100": ("h100-80g",),
    "H200": ("h200",),
    "B200": ("b200",),
    "L40S": ("l40s",),
    "4090": ("rtx4090",),
}
"""Parts of the names that devices report, and the kinds with such a name, which differ in their memory."""


def find_gpu(name: str | None) -> Gpu:
    """Return the named GPU; without a name the one that is here, else an A100 of 80 GB. ValueError for other names."""
    check_gpu_name(name)
    return GPUS[name] if name is not None else present_gpu() or GPUS[DEFAULT]


def check_gpu_name(name: str | None) -> None:
    """Raise ValueError for a name that no GPU here has."""
    if name is not None and name not in GPUS:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f"; did you mean {near[0]}? It" if near else "; it"
        raise ValueError(f"--gpu {name} is not known{hint} must be one of: {', '.join(GPUS)}")


def kind_of(gpu: Gpu) -> str | None:
    """Return the name in GPUS of a device's kind, by the name that it reports and its memory; None if it has none."""
    if gpu.name in GPUS:
        return gpu.name
    kinds = next((kinds for part, kinds in _NAMES.items() if part in gpu.name), ())
    return min(kinds, key=lambda kind: abs(GPUS[kind].capacity - gpu.capacity), default=None)


def present_gpu() -> Gpu | None:
    """Return the CUDA device of this process, with the rates of its kind where they are known."""
    import torch  # late, so that a command line is checked without it

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = kind_of(Gpu(properties.name, properties.total_memory, None, None, ""))
    kind = None if name is None else GPUS[name]
    if kind is None:
        return Gpu(properties.name, properties.total_memory, None, None, "rates of this device are not known")
    return Gpu(
        properties.name, properties.total_memory, kind.flops, kind.bandwidth, kind.source, kind.measured
    )
