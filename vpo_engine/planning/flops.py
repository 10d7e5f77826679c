"""Operations and scratch memory of operators, as functions of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import vpo_kernels.temporal_attention  # noqa: F401  (registers its operators)
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_aten, _ours = torch.ops.aten, torch.ops.vpo_kernels


def _attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Count two matrix products; q [..., N, D], k and v [..., M, D]."""
    return 4 * math.prod(q.shape) * k.shape[-2]


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Count five matrix products: the scores again, and the gradients of v, of the scores, of q and of k."""
    return 10 * math.prod(q.shape) * k.shape[-2]


def _temporal_attention(q: Tensor, *_: Any, **__: Any) -> int:
    """Count attention over N; q [..., N, heads, D]."""
    return 4 * math.prod(q.shape) * q.shape[-3]


def _temporal_attention_backward(grad: Tensor, q: Tensor, *_: Any, **__: Any) -> int:
    return 10 * math.prod(q.shape) * q.shape[-3]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ours.temporal_attention: _temporal_attention,
    _ours.temporal_attention_backward: _temporal_attention_backward,
}
"""Floating point operations of an operator (a multiplication with its addition is two), called with the operator's
arguments and ``out_val``. Operators without an entry have next to none: their time is that of their bytes."""


def _flash_backward(grad: Tensor, q: Tensor, *_: Any, **__: Any) -> int:
    """Return the bytes of FlashAttention 2's float32 sums on a GPU: of dq and of rows.

    The head dimension is rounded up to 32 and N to 128 (aten/src/ATen/native/transformers/cuda/flash_attn/
    flash_api.cpp, mha_bwd).
    """
    rows = math.prod(q.shape[:-2]) * -(-q.shape[-2] // 128) * 128
    return 4 * rows * (-(-q.shape[-1] // 32) * 32 + 1)


SCRATCH: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}
"""Bytes that an operator's GPU kernel takes for itself while it runs."""

WRITES_NOTHING = frozenset(
    {
        _aten.empty,
        _aten.empty_like,
        _aten.empty_strided,
        _aten.new_empty,
        _aten.new_empty_strided,
        _aten.detach,
        _aten.lift_fresh,
    }
)
"""Operators that move no bytes, though they are no views."""
