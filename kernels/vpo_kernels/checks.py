"""Checks of arguments that all operations share. Errors name argument, value, constraint and remedy."""

from __future__ import annotations

import torch
from torch import Tensor


def check_device(
    name: str, tensor: Tensor, device: torch.device, like_name: str, operation: str = ""
) -> None:
    """Raise ValueError unless ``tensor`` is on ``device``, on which the argument ``like_name`` is.

    name: name of the argument, for the error, as like_name is. operation: name of the operation, for the error.
    """
    if tensor.device != device:
        raise ValueError(
            f"{_argument(name, operation)} is on {tensor.device}, but must be where {like_name} is, on "
            f"{device}; pass {name}.to({str(device)!r})"
        )


def check_floating(name: str, tensor: Tensor, operation: str = "") -> None:
    """Raise ValueError unless ``tensor`` has a floating point dtype."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"{_argument(name, operation)} has dtype {tensor.dtype}, but must be floating point; "
            f"pass {name}.float()"
        )


def _argument(name: str, operation: str) -> str:
    return f"{name} of {operation}" if operation else name
