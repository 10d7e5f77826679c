"""``temporal_attention``: checks, choice of backend, autograd."""

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
from vpo_kernels.registration import operator, refuse_second_derivative
from vpo_kernels.temporal_attention import reference

MAX_LENGTH = 64
MAX_CHANNELS = 128


@operator("temporal_attention")
def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if runs_kernel(q, k, v):
        from vpo_kernels.temporal_attention import triton

        with torch.cuda.device_of(q):
            return triton.forward(q, k, v)
    with without_autocast(q):
        return new_like(q, dimensions=5).copy_(reference.temporal_attention(q, k, v))


@torch.library.register_fake("vpo_kernels::temporal_attention")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return new_like(q, dimensions=5)


@operator("temporal_attention_backward")
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if runs_kernel(q, k, v):
        from vpo_kernels.temporal_attention import triton

        with torch.cuda.device_of(grad):
            return triton.backward(grad, q, k, v)
    with without_autocast(q):
        return reference.backward(grad, q, k, v)


@torch.library.register_fake("vpo_kernels::temporal_attention_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q, dimensions=5), new_like(k, dimensions=5), new_like(v, dimensions=5)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("vpo_kernels::temporal_attention", _gradients, setup_context=_setup_context)
refuse_second_derivative("temporal_attention", "temporal_attention_backward", "use backend='reference'")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim < 4 or q.numel() == 0:
        raise ValueError(
            f"q of temporal_attention has shape {list(q.shape)}, but must be [rows, N, heads, D] or "
            "[B, rows, N, heads, D] with at least one element; unflatten the heads first"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(
                f"{name} of temporal_attention has shape {list(tensor.shape)}, but must have that of q, "
                f"{list(q.shape)}: this is self-attention; use scaled_dot_product_attention for anything else"
            )


def _check_kernel_limits(q: Tensor, k: Tensor, v: Tensor) -> None:
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
    """softmax(q k^T / sqrt(D)) v within each short sequence and head, no mask, no dropout.

    q, k and v [rows, N, heads, D] or [B, rows, N, heads, D], float, any strides: views of a qkv tensor
    [rows, N, 3, heads, D] are read in place, and so are transposed views, such as the frames of a patch out of
    [B, T, S, 3, heads, D]. Same shape. Gradients reach all three.

    backend: ``reference`` is torch's scaled_dot_product_attention. ``triton`` never writes scores to memory and
        saves q, k and v only; softmax in float32; N up to 64, D up to 128, one dtype (autocast's where that is
        on); keeps q's order of dimensions in memory; a NaN or infinity in v may spread to sequences that share its
        tile; no second derivative; float64 goes to the formula. ``auto`` is what the table in
        ``companions.py`` says, and the formula beyond the kernel's limits.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for ``triton`` on a CPU tensor unless
    the interpreter is on (TRITON_INTERPRET=1).
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
    return _forward(q, k, v)
