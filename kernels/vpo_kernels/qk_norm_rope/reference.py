"""RMS norm of a head, then rotary embedding, in plain torch: the formula, and the gradient that the kernel must give.

    y = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)        mean: over the D channels of a head
    out[2i]     = y[2i] * cos[n, i] - y[2i + 1] * sin[n, i]           n: position in the sequence
    out[2i + 1] = y[2i + 1] * cos[n, i] + y[2i] * sin[n, i]

It is what STDiT3 does (opensora/models/layers/blocks.py, ``Attention``; rotary_embedding_torch's interleaved pairs).
Shapes: x [..., N, heads, D]; weight [D]; cos and sin [N, 1, D / 2].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_kernels.registration import arithmetic_dtype
from vpo_kernels.token_layout import new_like


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding alone, in the dtype of x."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """Compute the formula, differentiably, in the dtype of x."""
    normed = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return normed if cos is None or sin is None else rotate(normed, cos, sin)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients to x (laid out as x) and to weight, in their dtypes; compute in float32 or better."""
    dtype = arithmetic_dtype(grad, x, weight)
    inner = grad.to(dtype)
    if cos is not None and sin is not None:
        inner = rotate(inner, cos, -sin)
    rstd = (x.to(dtype).square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = x.to(dtype) * rstd
    grad_weight = (inner * normed).sum_to_size(weight.shape).to(weight.dtype)
    inner = inner * weight.to(dtype)
    grad_x = new_like(x, dimensions=5)
    grad_x.copy_(rstd * (inner - normed * (inner * normed).mean(-1, keepdim=True)))
    return grad_x, grad_weight
