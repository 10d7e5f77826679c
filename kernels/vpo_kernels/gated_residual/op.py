"""``gated_residual``: its checks, and its registration with torch.library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vpo_kernels.fused_ops import (
    BackendName,
    check_floats,
    check_modulation,
    connect,
    register_fused_op,
    uses_triton,
)
from vpo_kernels.gated_residual import reference
from vpo_kernels.token_layout import group_modulations, new_like, promoted_dtype


def _new_output(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted_dtype(x, gate, y))


def _new_gradients(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), new_like(y)


_OPERATORS = register_fused_op(
    "gated_residual",
    reference.gated_residual,
    reference.backward,
    new_output=_new_output,
    new_gradients=_new_gradients,
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, gate, y = inputs
    ctx.save_for_backward(gate, y)
    ctx.dtype = x.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate, grad_y = _OPERATORS.backward(grad, *ctx.saved_tensors)
    return grad.to(ctx.dtype), grad_gate, grad_y


connect("gated_residual", _OPERATORS, _save, _differentiate)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, backend: BackendName = "auto") -> Tensor:
    """Add gate * y to x.

    x, y: [..., C], of one shape, any float dtypes and strides. gate: broadcasts to them and has all C channels; for x
        [B, T, S, C] it is [B, 1, 1, C] or [B, T, 1, C].
    backend: ``reference`` is plain torch, which torch.compile fuses and autograd differentiates. ``triton``
        computes in float32 whatever the dtype, gives a contiguous result, and has no second derivative;
        float64 takes the formula. ``auto`` is what the table ``AUTO`` in ``fused_ops.py`` says.

    Return [..., C] in the dtype that torch promotes the three to. Gradients reach all three.

    Raise ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless Triton
    interprets (TRITON_INTERPRET=1).
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
    (gate,) = group_modulations(x, gate)
    return _OPERATORS.forward(x, gate, y)
