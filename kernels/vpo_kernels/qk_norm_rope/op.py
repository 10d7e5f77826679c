"""``qk_norm_rope``: its checks, and its registration with torch.library."""

from __future__ import annotations

from torch import Tensor

from vpo_kernels.fused_ops import BackendName, check_floats, connect, register_fused_op, uses_triton
from vpo_kernels.qk_norm_rope import reference
from vpo_kernels.token_layout import new_like


def _new_output(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    return new_like(x, dimensions=5)


def _new_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return new_like(x, dimensions=5), weight.new_empty(weight.shape)


_OPERATORS = register_fused_op(
    "qk_norm_rope",
    reference.qk_norm_rope,
    reference.backward,
    new_output=_new_output,
    new_gradients=_new_gradients,
)
connect("qk_norm_rope", _OPERATORS)


def _check_tables(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raise ValueError unless cos and sin are both None, or both constants [N, 1, D / 2] for x [..., N, heads, D]."""
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
    """Apply RMS norm over the channels of a head, times weight, then rotary embedding on interleaved pairs.

    x: [..., N, heads, D], queries or keys, any float dtype and strides; a view of a qkv tensor
        [..., N, 3, heads, D] is read in place. weight: [D]. cos, sin: [N, 1, D / 2], or None for no rotation.
    backend: ``reference`` is plain torch, which torch.compile fuses and autograd differentiates. ``triton``
        computes in float32 whatever the dtype, keeps the order of dimensions in memory (up to five), saves
        x and weight only, and has no second derivative; float64 takes the formula. ``auto`` is what the table
        ``AUTO`` in ``fused_ops.py`` says.

    Return a tensor of the shape and dtype of x. Gradients reach x and weight; the tables are constants.

    Raise ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless Triton
    interprets (TRITON_INTERPRET=1).
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
    return _OPERATORS.forward(x, weight, cos, sin, eps)
