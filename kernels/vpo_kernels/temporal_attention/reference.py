"""Attention of short sequences in plain torch: the formula, and the gradient that the kernel must give.

    p = softmax(q k^T / sqrt(D)),   out = p v                        within one sequence and one head
    dv = p^T g,   dp = g v^T,   ds = p * (dp - sum_j p dp) / sqrt(D),   dq = ds k,   dk = ds^T q

Shapes: q, k, v and out [..., N, heads, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_kernels.registration import arithmetic_dtype
from vpo_kernels.token_layout import new_like


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the formula, differentiably, by one call of scaled_dot_product_attention on [sequences, heads, N, D]."""
    shape = (-1, *q.shape[-3:])
    q_h, k_h, v_h = (tensor.reshape(shape).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q_h, k_h, v_h).transpose(1, 2).reshape(q.shape)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to q, k and v, laid out as they are, in their dtypes; compute in float32 or better."""
    dtype = arithmetic_dtype(grad, q, k, v)
    scale = q.shape[-1] ** -0.5
    grad_h, q_h, k_h, v_h = (t.to(dtype).transpose(-3, -2) for t in (grad, q, k, v))  # [..., heads, N, D]
    p = torch.softmax(scale * (q_h @ k_h.mT), dim=-1)
    dp = grad_h @ v_h.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    products = (ds @ k_h, ds.mT @ q_h, p.mT @ grad_h)
    out = tuple(new_like(tensor, dimensions=5) for tensor in (q, k, v))
    for tensor, product in zip(out, products, strict=True):
        tensor.copy_(product.transpose(-3, -2))
    return out[0], out[1], out[2]
