"""Modulated LayerNorm in plain torch: the formula, and the gradient that the kernel must give.

    n = (x - mean) * rstd,   rstd = 1 / sqrt(var + eps)        mean, var: over the C channels of a token
    out = n * (1 + scale) + shift

It is adaLN of DiT (arXiv 2212.09748) as STDiT3 uses it (opensora/models/layers/blocks.py, ``t2i_modulate``).
Shapes: x [..., C]; shift and scale broadcast to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_kernels.registration import arithmetic_dtype


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute the formula, differentiably, in the dtype that torch promotes the three to."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=eps)
    return torch.addcmul(shift, normed, 1 + scale)


def backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to x, shift and scale, in their shapes and dtypes; compute in float32 or better."""
    dtype = arithmetic_dtype(grad, x, shift, scale)
    variance, mean = torch.var_mean(x.to(dtype), dim=-1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normed = (x.to(dtype) - mean) * rstd
    grad_out = grad.to(dtype)
    inner = grad_out * (1 + scale.to(dtype))
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True))
    grad_shift = x.new_empty(shift.shape, dtype=shift.dtype)
    grad_scale = x.new_empty(scale.shape, dtype=scale.dtype)
    grad_shift.copy_(grad_out.sum_to_size(shift.shape))
    grad_scale.copy_((grad_out * normed).sum_to_size(scale.shape))
    return grad_x.to(x.dtype).contiguous(), grad_shift, grad_scale
