"""``gated_residual``: checks, choice of backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpo_kernels.companions import (
    BackendName,
    check_floats,
    check_modulation,
    grouped,
    new_like,
    promoted_dtype,
    runs_kernel,
    uses_triton,
)
from vpo_kernels.gated_residual import reference
from vpo_kernels.registration import operator, refuse_second_derivative


@operator("gated_residual")
def _forward(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    if runs_kernel(x, gate, y):
        from vpo_kernels.gated_residual import triton

        with torch.cuda.device_of(x):
            return triton.forward(x, gate, y)
    return reference.gated_residual(x, gate, y).contiguous()


@torch.library.register_fake("vpo_kernels::gated_residual")
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted_dtype(x, gate, y))


@operator("gated_residual_backward")
def _backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if runs_kernel(grad, gate, y):
        from vpo_kernels.gated_residual import triton

        with torch.cuda.device_of(grad):
            return triton.backward(grad, gate, y)
    return reference.backward(grad, gate, y)


@torch.library.register_fake("vpo_kernels::gated_residual_backward")
def _(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), new_like(y)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, gate, y = inputs
    ctx.save_for_backward(gate, y)
    ctx.dtype = x.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate, grad_y = _backward(grad, *ctx.saved_tensors)
    return grad.to(ctx.dtype), grad_gate, grad_y


torch.library.register_autograd("vpo_kernels::gated_residual", _gradients, setup_context=_setup_context)
refuse_second_derivative("gated_residual", "gated_residual_backward", "use backend='reference'")


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, backend: BackendName = "auto") -> Tensor:
    """x + gate * y.

    x and y [..., C], of one shape, any float dtypes and strides; gate broadcasts to them and has all C
    channels: for x [B, T, S, C], [B, 1, 1, C] or [B, T, 1, C]. In the dtype that torch promotes the three to.
    Gradients reach all three.

    backend: ``reference`` is plain torch, which torch.compile fuses and autograd differentiates. ``triton``
        computes in float32 whatever the dtype, gives a contiguous result, and has no second derivative;
        float64 goes to the formula. ``auto`` is what the table in ``companions.py`` says.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless
    the interpreter is on (TRITON_INTERPRET=1).
    """
    check_floats("gated_residual", x=x, gate=gate, y=y)
    check_modulation("gated_residual", x, gate=gate)
    if y.shape != x.shape:
        raise ValueError(
            f"y of gated_residual has shape {list(y.shape)}, but must have that of x, {list(x.shape)}; "
            "only the gate broadcasts, so expand y first"
        )
    if not uses_triton("gated_residual", backend, x):
        return reference.gated_residual(x, gate, y)
    (gate,) = grouped(x, gate)
    return _forward(x, gate, y)
