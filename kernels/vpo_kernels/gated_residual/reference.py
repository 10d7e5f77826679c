"""Gated residual in plain torch: the formula, and the gradient that the kernel must give.

    out = x + gate * y

Shapes: x and y [..., C]; gate broadcasts to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpo_kernels.registration import arithmetic_dtype
from vpo_kernels.token_layout import new_like


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute the formula, differentiably, in the dtype that torch promotes the three to."""
    return torch.addcmul(x, gate, y)


def backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients to gate and y, in their shapes and dtypes; compute in float32 or better.

    The gradient to x is ``grad`` itself.
    """
    dtype = arithmetic_dtype(grad, gate, y)
    grad_out = grad.to(dtype)
    grad_gate = gate.new_empty(gate.shape)
    grad_gate.copy_((grad_out * y.to(dtype)).sum_to_size(gate.shape))
    grad_y = new_like(y)
    grad_y.copy_(grad_out * gate.to(dtype))
    return grad_gate, grad_y
