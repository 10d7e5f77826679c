"""``temporal_attention``: its checks, and its registration with torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from vpo_kernels.fused_ops import BackendName, check_floats, connect, register_fused_op, uses_triton
from vpo_kernels.temporal_attention import reference
from vpo_kernels.token_layout import new_like

MAX_LENGTH = 64
MAX_CHANNELS = 128


def _new_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return new_like(q, dimensions=5)


def _new_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q, dimensions=5), new_like(k, dimensions=5), new_like(v, dimensions=5)


_OPERATORS = register_fused_op(
    "temporal_attention",
    reference.temporal_attention,
    reference.backward,
    new_output=_new_output,
    new_gradients=_new_gradients,
)
connect("temporal_attention", _OPERATORS)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are of one shape [..., sequences, N, heads, D] with an element."""
    if q.ndim < 4 or q.numel() == 0:
        raise ValueError(
            f"q of temporal_attention has shape {list(q.shape)}, but must be [sequences, N, heads, D] or "
            "[B, sequences, N, heads, D] with at least one element; unflatten the heads first"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(
                f"{name} of temporal_attention has shape {list(tensor.shape)}, but must have that of q, "
                f"{list(q.shape)}: this is self-attention; use scaled_dot_product_attention for anything else"
            )


def _check_kernel_limits(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for sizes and dtypes that the Triton kernel does not take."""
    if q.shape[-3] > MAX_LENGTH or q.shape[-1] > MAX_CHANNELS:
        raise ValueError(
            f"temporal_attention got N={q.shape[-3]} and D={q.shape[-1]}, but backend='triton' takes N up to "
            f"{MAX_LENGTH} and D up to {MAX_CHANNELS}; use backend='auto'"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(
                f"{name} of temporal_attention has dtype {tensor.dtype}, but must have that of q, {q.dtype}; "
                f"pass {name}.to(q.dtype)"
            )


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, backend: BackendName = "auto") -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v within each short sequence and head, without mask and dropout.

    q, k, v: [sequences, N, heads, D] or [B, sequences, N, heads, D], float, any strides. Views of a qkv tensor
        [sequences, N, 3, heads, D] are read in place, and so are transposed views, such as the frames of a patch
        out of [B, T, S, 3, heads, D].
    backend: ``reference`` is torch's scaled_dot_product_attention. ``triton`` never writes scores to memory, saves
        q, k and v only, and computes the softmax in float32. It takes N up to 64, D up to 128 and one dtype
        (autocast's where that is on), keeps q's order of dimensions in memory, and has no second derivative. A NaN
        or infinity in v may spread to sequences that share its tile. float64 takes the formula. ``auto`` is what
        the table ``AUTO`` in ``fused_ops.py`` says, and the formula beyond the kernel's limits.

    Return a tensor of the shape of q. Gradients reach all three.

    Raise ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless Triton
    interprets (TRITON_INTERPRET=1).
    """
    check_floats("temporal_attention", q=q, k=k, v=v)
    _check_shapes(q, k, v)
    fits = q.shape[-3] <= MAX_LENGTH and q.shape[-1] <= MAX_CHANNELS
    if backend == "auto" and not fits:
        backend = "reference"
    if not uses_triton("temporal_attention", backend, q):
        return reference.temporal_attention(q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_kernel_limits(q, k, v)
    return _OPERATORS.forward(q, k, v)
