"""Compile functions of blocks with torch.compile, for sampling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T], backend: str = "inductor", whole: bool = True) -> Callable[P, T]:
    """Compile a function once for all sizes of its tensors; in several pieces unless it is to be ``whole``."""
    return torch.compile(function, dynamic=True, fullgraph=whole, backend=backend)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile needs a C++ compiler and finds none."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise ValueError(
            f"rollout.compile=blocks needs a C++ compiler on a CPU, but none of {', '.join(names)} is there; install "
            "one, name it in the environment variable CXX, or set rollout.compile=none"
        )
