"""Choice of the backend that computes the paired loss and the ordered deltas.

A backend is a module ``vpo_kernels.OPERATION.NAME``. It is available if it can be imported, which is tried once; where
that fails, the reason is kept and told.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Literal, get_args

import torch

BackendName = Literal["auto", "reference", "native", "triton"]
OperationName = Literal["paired_dpo", "ordered_delta"]
_NAMES = get_args(BackendName)  # here, because torch.compile of torch 2.6 does not know get_args
_MODULES = ("reference", "native", "triton")
_FASTEST = {"cpu": "native", "cuda": "triton"}
"""The backend that ``auto`` takes, by the device's type; plain torch elsewhere."""
_REMEDY = {
    "native": "build it with a C++17 compiler at hand, in a clone: pip install --force-reinstall --no-deps . (or "
    "./kernels, for vpo-kernels)",
    "triton": "install triton 3.4 or newer, which needs Linux and comes with torch 2.8 and newer",
}


@functools.cache
def load(operation: OperationName, name: str) -> ModuleType:
    """Return the module of a backend. Raise ImportError, with the reason, where it cannot run."""
    return importlib.import_module(f"vpo_kernels.{operation}.{name}")


@functools.cache
def _import_error(operation: OperationName, name: str) -> str:
    """Return why a backend cannot be imported; an empty string if it can."""
    try:
        load(operation, name)
    except ImportError as error:
        return str(error)
    return ""


def _obstacle(operation: OperationName, name: str, device: torch.device) -> str:
    """Return why a backend does not run on a device; an empty string if it does."""
    if name == "native" and device.type != "cpu":
        return "it runs on the CPU only"
    if name == "triton" and device.type != "cuda":
        if device.type != "cpu":
            return "it runs on CUDA and ROCm devices only"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "it runs on CUDA and ROCm devices, on the CPU only in a process with TRITON_INTERPRET=1"
    return "" if name == "reference" else _import_error(operation, name)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return, for each backend of ``paired_dpo_loss``, why it does not run on ``device``; "" where it does."""
    device = torch.device(device)
    return {name: _obstacle("paired_dpo", name, device) for name in _MODULES}


@functools.cache
def _warn_of_fallback(operation: OperationName, name: str, reason: str) -> None:
    """Warn, once per process and reason, that plain torch stands in for a faster backend."""
    warnings.warn(
        f"{operation}: the {name} backend is not available ({reason}), so plain torch takes its place, as "
        f"exactly but slower; {_REMEDY[name]}",
        RuntimeWarning,
        stacklevel=2,
    )


def check_name(name: str) -> None:
    """Raise ValueError for a name that no backend has."""
    if name not in _NAMES:
        raise ValueError(f"backend={name!r} is unknown; it must be one of: {', '.join(_NAMES)}")


def choose_backend(operation: OperationName, name: str, device: torch.device) -> ModuleType:
    """Return the module of the backend that ``name`` means on a device.

    ``auto`` means the fastest; where that cannot be imported, plain torch takes its place and a RuntimeWarning says
    so, once. Raise ValueError for any other name whose backend does not run on the device.
    """
    if name == "auto":
        name = _FASTEST.get(device.type, "reference")
        if reason := _obstacle(operation, name, device):
            _warn_of_fallback(operation, name, reason)
            name = "reference"
    elif reason := _obstacle(operation, name, device):
        works = [other for other in _MODULES if not _obstacle(operation, other, device)]
        raise ValueError(
            f"backend={name!r} is not available for tensors on {device}: {reason}. Available there: "
            f"{', '.join(['auto', *works])}"
        )
    return load(operation, name)
