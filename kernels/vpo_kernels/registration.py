"""Registration of operators with torch.library, and the dtype in which operations compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any of the tensors is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def define_operator(
    name: str,
    signature: Callable[..., Any],
    implementation: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> Any:
    """Define torch.ops.vpo_kernels.NAME for every device and return it.

    signature: a function whose annotated parameters are the operator's. implementation: what the operator runs.
    mutates: names of the parameters to which the implementation writes.

    This does what torch.library.custom_op does, except that the first eager call does not import torch._dynamo, and
    with it triton. Give the operator its fake and its gradient by torch.library.register_fake and register_autograd
    under ``vpo_kernels::NAME``.
    """
    qualified = f"vpo_kernels::{name}"
    torch.library.define(qualified, torch.library.infer_schema(signature, mutates_args=mutates))
    torch.library.impl(qualified, "default", implementation)
    return getattr(torch.ops.vpo_kernels, name).default


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function the operator torch.ops.vpo_kernels.NAME; see ``define_operator``."""

    def register(function: Callable[..., Any]) -> Any:
        return define_operator(name, function, function, mutates)

    return register


def refuse_second_derivative(operation: str, backward: str, remedy: str) -> None:
    """Make differentiating ``vpo_kernels::BACKWARD``, the gradient of ``operation``, raise RuntimeError."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{operation} has no second derivative; {remedy}")

    torch.library.register_autograd(f"vpo_kernels::{backward}", refuse)
