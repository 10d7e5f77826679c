"""Choice of the attention backend: torch's own unless another is asked for, or has been measured to win."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import torch

from vpo_kernels.attention.packages import PACKAGES, PackageName, import_package

BackendName = Literal["sdpa", "flash2", "flash3", "flash4", "xformers"]
AttentionName = Literal["auto", "sdpa", "flash2", "flash3", "flash4", "xformers"]

WINNERS: dict[tuple[int, int], PackageName] = {}
"""Maps (compute capability as 90 for 9.0, channels of a head) to the package that has been measured to beat torch's
attention there, forward plus backward. An entry needs a committed benchmark result; without one, torch's runs."""


class Choice(NamedTuple):
    """A backend that works here, and the reason for choosing it. Its text is the line that a run prints."""

    name: BackendName
    reason: str

    def __str__(self) -> str:
        return f"attention: {self.name} ({self.reason})"


@functools.cache
def choose_attention(
    name: AttentionName = "auto", *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Choice:
    """Return the backend for attention in ``dtype`` on ``device`` with ``head_dim`` channels per head.

    ``auto`` takes torch's scaled dot product attention unless ``WINNERS`` names another that imports. On a
    GPU it imports every package that fits, so that the reason says which are installed; on a CPU it imports none.
    Raise ValueError, with the reason and the names that do work here, for any other name that does not.
    """
    if name not in get_args(AttentionName):
        raise ValueError(
            f"attention={name!r} is unknown; it must be one of: {', '.join(get_args(AttentionName))}"
        )
    if name == "sdpa":
        return Choice("sdpa", "as configured")
    if name == "auto":
        return _best(device, dtype, head_dim)
    obstacle = _obstacle(name, device, dtype, head_dim)
    if obstacle is not None:
        working = [other for other in PACKAGES if _obstacle(other, device, dtype, head_dim) is None]
        raise ValueError(
            f"attention={name!r} cannot run here: {obstacle}; choose one of: {', '.join(['auto', 'sdpa', *working])}"
        )
    return Choice(name, "as configured")


def _best(device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """Return the backend that ``auto`` means."""
    if device.type != "cuda":
        return Choice("sdpa", f"{device.type}; {', '.join(PACKAGES)} need a CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    place = f"sm{major}{minor} at head dim {head_dim}"
    winner = WINNERS.get((10 * major + minor, head_dim))
    notes: list[str] = []
    for package in PACKAGES:
        obstacle = _obstacle(package, device, dtype, head_dim)
        if obstacle is None and package == winner:
            return Choice(package, f"the fastest measured on {place}")
        notes.append(f"{package}: {obstacle or f'no measured win on {place}'}")
    return Choice("sdpa", "; ".join(notes))


def _obstacle(package: PackageName, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a package cannot run, None if it can. Import it only where nothing else stands in the way."""
    limits = PACKAGES[package]
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in limits.dtypes:
        names = " or ".join(str(known).removeprefix("torch.") for known in limits.dtypes)
        return f"it needs {names}, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    largest = limits.largest_head.get(major)
    if largest is None:
        return f"it has no kernels for sm{major}{minor}"
    if head_dim > largest or head_dim % limits.head_multiple:
        return f"it needs a head dim up to {largest} and a multiple of {limits.head_multiple}, not {head_dim}"
    return import_package(package)
