"""``qk_norm_rope``: checks, choice of backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpo_kernels.companions import (
    BackendName,
    check_floats,
    new_like,
    runs_kernel,
    uses_triton,
    without_autocast,
)
from vpo_kernels.qk_norm_rope import reference
from vpo_kernels.registration import operator, refuse_second_derivative


@operator("qk_norm_rope")
def _forward(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    if runs_kernel(x, weight):
        from vpo_kernels.qk_norm_rope import triton

        with torch.cuda.device_of(x):
            return triton.forward(x, weight, cos, sin, eps)
    with without_autocast(x):
        return new_like(x, dimensions=5).copy_(reference.qk_norm_rope(x, weight, cos, sin, eps))


@torch.library.register_fake("vpo_kernels::qk_norm_rope")
def _(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    return new_like(x, dimensions=5)


@operator("qk_norm_rope_backward")
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if runs_kernel(x, weight):
        from vpo_kernels.qk_norm_rope import triton

        with torch.cuda.device_of(grad):
            return triton.backward(grad, x, weight, cos, sin, eps)
    return reference.backward(grad, x, weight, cos, sin, eps)


@torch.library.register_fake("vpo_kernels::qk_norm_rope_backward")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return new_like(x, dimensions=5), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None


torch.library.register_autograd("vpo_kernels::qk_norm_rope", _gradients, setup_context=_setup_context)
refuse_second_derivative("qk_norm_rope", "qk_norm_rope_backward", "use backend='reference'")


def _check_tables(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "cos" if cos is None else "sin"
        raise ValueError(
            f"{missing} of qk_norm_rope is None while the other table is not; give both, or neither for no "
            "rotary embedding"
        )
    check_floats("qk_norm_rope", x=x, cos=cos, sin=sin)
    shape = (x.shape[-3], 1, x.shape[-1] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if x.shape[-1] % 2 or table.shape != shape:
            raise ValueError(
                f"{name} of qk_norm_rope has shape {list(table.shape)}, but must be [N, 1, D / 2] for x "
                f"[..., N, heads, D] with even D, here {list(x.shape)}; make it with rotary_tables of that "
                "length"
            )
        if table.requires_grad:
            raise ValueError(
                f"{name} of qk_norm_rope requires a gradient, but the tables are constants; pass "
                f"{name}.detach()"
            )


def qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    backend: BackendName = "auto",
) -> Tensor:
    """RMS norm over the channels of a head, times weight, then rotary embedding on interleaved pairs.

    x [..., N, heads, D]: queries or keys, any float dtype and strides; a view of a qkv tensor
    [..., N, 3, heads, D] is read in place. weight [D]. cos and sin [N, 1, D / 2], or None for no rotation.
    Same shape and dtype as x. Gradients reach x and weight; the tables are constants.

    backend: ``reference`` is plain torch, which torch.compile fuses and autograd differentiates. ``triton``
        computes in float32 whatever the dtype, keeps the order of dimensions in memory (up to five), saves
        x and weight only, and has no second derivative; float64 goes to the formula. ``auto`` is what the table
        in ``companions.py`` says.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless
    the interpreter is on (TRITON_INTERPRET=1).
    """
    check_floats("qk_norm_rope", x=x, weight=weight)
    if x.ndim < 3 or x.numel() == 0:
        raise ValueError(
            f"x of qk_norm_rope has shape {list(x.shape)}, but must be [..., N, heads, D] with at least one "
            "element; unflatten the heads first"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight of qk_norm_rope has shape {list(weight.shape)}, but must be [D], here "
            f"[{x.shape[-1]}]; it is shared by all heads"
        )
    _check_tables(x, cos, sin)
    if not uses_triton("qk_norm_rope", backend, x):
        return reference.qk_norm_rope(x, weight, cos, sin, eps)
    return _forward(x, weight, cos, sin, eps)
