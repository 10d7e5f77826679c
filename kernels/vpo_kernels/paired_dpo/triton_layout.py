"""Description of how samples lie in memory, in as few dimensions as describe all tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

View = tuple[Tensor, int, tuple[int, ...]]
"""A pointer, the elements between pairs, and strides inside a sample (() if its elements lie one after the other)."""


def _contiguous(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether elements of these sizes and strides lie one after the other."""
    return all(stride == math.prod(sizes[dim + 1 :]) for dim, stride in enumerate(strides))


def _collapse(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Join neighbouring dimensions where all of ``strides`` allow it.

    Return sizes and strides, the last dimension first.
    """
    ends = [
        dim
        for dim in range(len(sizes))
        if dim + 1 == len(sizes) or any(s[dim] != sizes[dim + 1] * s[dim + 1] for s in strides)
    ]
    starts = [dim + 1 for dim in [-1, *ends[:-1]]]
    collapsed = tuple(math.prod(sizes[a : b + 1]) for a, b in zip(starts, ends, strict=True))
    return collapsed[::-1], [tuple(s[dim] for dim in ends[::-1]) for s in strides]


def views(tensors: Sequence[Tensor | None]) -> tuple[list[View | None], tuple[int, ...]]:
    """Return views of tensors [P, ...] of one shape, and the sizes that the strides inside their samples belong to.

    Both run from the last dimension to the first. Sizes are () if the elements of each sample lie one after the other
    in all tensors.
    """
    shape = next(tensor.shape for tensor in tensors if tensor is not None)
    dims = [dim for dim in range(1, len(shape)) if shape[dim] > 1]
    sizes = [shape[dim] for dim in dims]
    strides = {i: [t.stride(dim) for dim in dims] for i, t in enumerate(tensors) if t is not None}
    general = [i for i, s in strides.items() if not _contiguous(sizes, s)]
    collapsed, inner = _collapse(sizes, [strides[i] for i in general]) if general else ((), [])
    inner_of = dict(zip(general, inner, strict=True))
    found = [
        None if t is None else (t, t.stride(0) if shape[0] > 1 else 0, inner_of.get(i, ()))
        for i, t in enumerate(tensors)
    ]
    return found, collapsed
