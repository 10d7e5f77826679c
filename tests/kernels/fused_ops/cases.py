"""Inputs of the fused ops at odd sizes and strides, and the judgement of their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from vpo_kernels.gated_residual import gated_residual
from vpo_kernels.modulated_norm import modulated_norm
from vpo_kernels.qk_norm_rope import qk_norm_rope
from vpo_kernels.temporal_attention import temporal_attention

Operation = Callable[..., Tensor]
EPS = 1e-6


class Case(NamedTuple):
    operation: Operation  # of (*inputs, backend=...)
    registered: Operation  # the registered operation, of inputs only
    inputs: list[Tensor]  # leaves that require a gradient, in the case's dtypes
    view: Callable[..., tuple[Tensor, ...]]  # from the leaves to the operation's tensors: strides


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


# Shapes of x and of its modulations: more tokens than a chunk, one channel, channels that are no power of two, more
# and fewer dimensions than four.
MODULATED = [
    ((2, 3, 5, 72), (2, 1, 1, 72)),
    ((2, 2, 3, 33), (2, 2, 1, 33)),
    ((1, 1, 3, 1152), (1, 1, 1, 1152)),
    ((1, 4, 100, 24), (1, 1, 1, 24)),
    ((2, 3, 2, 40), (1, 3, 1, 40)),
    ((2, 1, 2, 40), (2, 1, 2, 40)),
    ((3, 300), (300,)),
    ((2, 2, 1, 2, 17), (2, 1, 1, 1, 17)),
    ((3, 1), (1, 1)),
]


def modulated(x_shape: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Case:
    """Return a case of ``modulated_norm``.

    If ``strided``, x is stored with two of its dimensions exchanged. shift and scale are views of one tensor.
    """
    stored = _exchanged(x_shape) if strided else x_shape
    joint = (*shape[:-1], 2, shape[-1])

    def view(x: Tensor, both: Tensor) -> tuple[Tensor, ...]:
        return x.transpose(-2, -3) if strided and x.ndim > 2 else x, *both.unbind(-2)

    return Case(
        lambda x, shift, scale, backend: modulated_norm(x, shift, scale, EPS, backend),
        lambda x, shift, scale: torch.ops.vpo_kernels.modulated_norm(x, shift, scale, EPS),
        [_leaf(stored, dtype, 0), _leaf(joint, dtype, 1)],
        view,
    )


def residual(x_shape: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Case:
    """Return a case of ``gated_residual``.

    If ``strided``, y is stored with two of its dimensions exchanged, as attention over time leaves it.
    """
    stored = _exchanged(x_shape) if strided else x_shape

    def view(x: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x, gate, y.transpose(-2, -3) if strided and y.ndim > 2 else y

    return Case(
        gated_residual,
        torch.ops.vpo_kernels.gated_residual,
        [_leaf(x_shape, dtype, 0), _leaf(shape, dtype, 1), _leaf(stored, dtype, 2)],
        view,
    )


def _exchanged(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3], shape[-2], shape[-3], shape[-1]) if len(shape) > 2 else shape


# sequences, N, heads, D
HEADS = [(9, 5, 4, 72), (3, 1, 3, 10), (1, 33, 2, 128), (3, 3, 2, 2)]


def normed_heads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, rope: bool, exchanged: bool = False
) -> Case:
    """Return a case of ``qk_norm_rope`` on the keys of a qkv tensor.

    If ``exchanged``, that is [2, N, sequences, 3, heads, D], viewed as [2, sequences, N, 3, heads, D].
    """
    sequences, length, heads, channels = shape
    stored = (
        (2, length, sequences, 3, heads, channels) if exchanged else (sequences, length, 3, heads, channels)
    )
    angles = torch.linspace(-4, 9, length * (channels // 2), dtype=torch.float64).view(length, 1, -1)
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rope else (None, None)

    def view(qkv: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        keys = qkv.unbind(-3)[1]
        return keys.transpose(1, 2) if exchanged else keys, weight

    def in_dtype(x: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(table if table is None else table.to(x) for table in tables)

    return Case(
        lambda x, weight, backend: qk_norm_rope(x, weight, *in_dtype(x), EPS, backend),
        lambda x, weight: torch.ops.vpo_kernels.qk_norm_rope(x, weight, *in_dtype(x), EPS),
        [_leaf(stored, dtype, 0), _leaf((channels,), dtype, 1)],
        view,
    )


LENGTHS = [1, 2, 5, 8, 10, 16, 20, 33, 64]


def short_sequences(
    shape: tuple[int, int, int, int], dtype: torch.dtype, exchanged: bool = False, spread: float = 1.0
) -> Case:
    """Return a case of ``temporal_attention`` on a qkv tensor as in ``normed_heads``. spread: size of the queries."""
    sequences, length, heads, channels = shape
    stored = (
        (2, length, sequences, 3, heads, channels) if exchanged else (sequences, length, 3, heads, channels)
    )

    def view(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (qkv.transpose(1, 2) if exchanged else qkv).unbind(-3)
        return q * spread if spread != 1.0 else q, k, v

    return Case(temporal_attention, torch.ops.vpo_kernels.temporal_attention, [_leaf(stored, dtype, 0)], view)


def results(case: Case, dtype: torch.dtype | None = None, backend: str | None = None) -> list[Tensor]:
    """Return output and gradients of the leaves, from the registered operation if no backend is named."""
    leaves = [(t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_() for t in case.inputs]
    tensors = case.view(*leaves)
    out = case.registered(*tensors) if backend is None else case.operation(*tensors, backend=backend)
    seed = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=seed, dtype=torch.float64).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_as_good_as_eager(case: Case, backend: str | None = None, ulps: float = 1.0) -> None:
    """Assert that the largest error against float64 is at most twice that of eager torch in that dtype, plus an ulp.

    This is the rule of flash-attention's tests (tests/cute/test_flash_attn.py); the ulp, of the largest element, allows
    for the rounding of the result, which the interpreter truncates in bfloat16.
    """
    truth = results(case, torch.float64, "reference")
    eager = results(case, backend="reference")
    ours = results(case, backend=backend)
    for name, exact, plain, fused in zip(
        ("out", "grad 0", "grad 1", "grad 2"), truth, eager, ours, strict=False
    ):
        assert fused.dtype == plain.dtype, name
        assert fused.shape == plain.shape, name
        error, allowed = (fused - exact).abs().max(), 2 * (plain - exact).abs().max()
        allowed = allowed + ulps * torch.finfo(fused.dtype).eps * exact.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
