"""Checks of arguments that all operations share. Errors name argument, value, constraint and remedy."""

from __future__ import annotations

from torch import Tensor


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str, operation: str = "") -> None:
    """Raise ValueError unless ``tensor`` is on the device of ``like``.

    name, like_name: names of the two arguments, for the error. operation: name of the operation, for the error.
    """
    if tensor.device != like.device:
        raise ValueError(
            f"{_argument(name, operation)} is on {tensor.device}, but must be where {like_name} is, on "
            f"{like.device}; pass {name}.to({str(like.device)!r})"
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
