"""``modulated_norm``: its checks, and its registration with torch.library."""

from __future__ import annotations

from torch import Tensor

from vpo_kernels.fused_ops import (
    BackendName,
    check_floats,
    check_modulation,
    connect,
    register_fused_op,
    uses_triton,
)
from vpo_kernels.modulated_norm import reference
from vpo_kernels.token_layout import group_modulations, promoted_dtype


def _new_output(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted_dtype(x, shift, scale))


def _new_gradients(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


_OPERATORS = register_fused_op(
    "modulated_norm",
    reference.modulated_norm,
    reference.backward,
    new_output=_new_output,
    new_gradients=_new_gradients,
)
connect("modulated_norm", _OPERATORS)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, backend: BackendName = "auto"
) -> Tensor:
    """Normalise x over its last dimension as LayerNorm without affine parameters does, times (1 + scale), plus shift.

    x: [..., C], any float dtype and strides. shift, scale: broadcast to x and have all C channels; for x
        [B, T, S, C] they are [B, 1, 1, C] or [B, T, 1, C].
    backend: ``reference`` is plain torch, which torch.compile fuses and autograd differentiates. ``triton``
        computes in float32 whatever the dtype, saves x, shift and scale only, and has no second derivative;
        float64 takes the formula. ``auto`` is what the table ``AUTO`` in ``fused_ops.py`` says.

    Return [..., C], contiguous, in the dtype that torch promotes the three to. Gradients reach all three. This is
    adaLN of DiT (arXiv 2212.09748) as STDiT3 applies it.

    Raise ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless Triton
    interprets (TRITON_INTERPRET=1).
    """
    check_floats("modulated_norm", x=x, shift=shift, scale=scale)
    check_modulation("modulated_norm", x, shift=shift, scale=scale)
    if not uses_triton("modulated_norm", backend, x):
        return reference.modulated_norm(x, shift, scale, eps)
    shift, scale = group_modulations(x, shift, scale)
    return _OPERATORS.forward(x, shift, scale, eps)
