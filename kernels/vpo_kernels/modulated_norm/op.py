"""``modulated_norm``: checks, choice of backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpo_kernels.companions import (
    BackendName,
    check_floats,
    check_modulation,
    grouped,
    promoted_dtype,
    runs_kernel,
    uses_triton,
    without_autocast,
)
from vpo_kernels.modulated_norm import reference
from vpo_kernels.registration import operator, refuse_second_derivative


@operator("modulated_norm")
def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    if runs_kernel(x, shift, scale):
        from vpo_kernels.modulated_norm import triton

        with torch.cuda.device_of(x):
            return triton.forward(x, shift, scale, eps)
    with without_autocast(x):
        out = reference.modulated_norm(x, shift, scale, eps)
    return out.contiguous()


@torch.library.register_fake("vpo_kernels::modulated_norm")
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted_dtype(x, shift, scale))


@operator("modulated_norm_backward")
def _backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_kernel(x, shift, scale):
        from vpo_kernels.modulated_norm import triton

        with torch.cuda.device_of(grad):
            return triton.backward(grad, x, shift, scale, eps)
    return reference.backward(grad, x, shift, scale, eps)


@torch.library.register_fake("vpo_kernels::modulated_norm_backward")
def _(grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd("vpo_kernels::modulated_norm", _gradients, setup_context=_setup_context)
refuse_second_derivative("modulated_norm", "modulated_norm_backward", "use backend='reference'")


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, backend: BackendName = "auto"
) -> Tensor:
    """LayerNorm of x over its last dimension without affine parameters, times (1 + scale), plus shift.

    x [..., C], any float dtype and strides; shift and scale broadcast to it and have all C channels: for
    x [B, T, S, C], [B, 1, 1, C] or [B, T, 1, C]. Contiguous, in the dtype that torch promotes the three to.
    Gradients reach all three.

    backend: ``reference`` is plain torch, which torch.compile fuses and autograd differentiates. ``triton``
        computes in float32 whatever the dtype, saves x, shift and scale only, and has no second derivative;
        float64 goes to the formula. ``auto`` is what the table in ``companions.py`` says.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless
    the interpreter is on (TRITON_INTERPRET=1).
    """
    check_floats("modulated_norm", x=x, shift=shift, scale=scale)
    check_modulation("modulated_norm", x, shift=shift, scale=scale)
    if not uses_triton("modulated_norm", backend, x):
        return reference.modulated_norm(x, shift, scale, eps)
    shift, scale = grouped(x, shift, scale)
    return _forward(x, shift, scale, eps)
