"""What every operation of the package shares: its registration with torch.library, the dtype it computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of them is float64, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function becomes torch.ops.vpo_kernels.NAME, for every device.

    It may write to those of its arguments that ``mutates`` names. As torch.library.custom_op, less its import of
    torch._dynamo (and with it triton) at the first eager call. The result is the operator itself; give it its fake
    and its gradient by torch.library.register_fake and register_autograd under ``vpo_kernels::NAME``.
    """

    def register(function: Callable[..., Any]) -> Any:
        qualified = f"vpo_kernels::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(qualified, "default", function)
        return getattr(torch.ops.vpo_kernels, name).default

    return register


def refuse_second_derivative(operation: str, backward: str, remedy: str) -> None:
    """Give ``vpo_kernels::BACKWARD``, which computes the gradient of ``operation``, an error as its gradient."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{operation} has no second derivative; {remedy}")

    torch.library.register_autograd(f"vpo_kernels::{backward}", refuse)
