"""The ways to store one matrix of the reference and to decode it when its layer runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Scratch:
    """Working memory of a forward pass: one buffer per device and dtype, into which matrices are decoded in turn.

    ``numel`` is the size of the largest matrix. Each ``take`` overwrites the result of the one before, if both have
    the same device and dtype.
    """

    def __init__(self) -> None:
        self.numel = 0
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a contiguous tensor with undefined values, no larger than ``numel``."""
        key = device, dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.numel, dtype=dtype, device=device)
        return self._buffers[key][: torch.Size(shape).numel()].view(shape)

    def release(self) -> None:
        self._buffers.clear()


class HeldWeight(Protocol):
    """A matrix [out, in] of the reference in one of the storages."""

    @property
    def scratch_numel(self) -> int:
        """The number of elements of the buffer that ``decode`` uses."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return all stored tensors by the part's name; "" is the matrix itself."""
        ...

    def refresh(self) -> None:
        """Store the policy's current weight."""
        ...

    def decode(self, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        """Return the matrix in ``dtype``; it is valid until the next ``scratch.take``."""
        ...

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless ``parts`` has the names, shapes and dtypes that ``tensors`` gives."""
        ...

    def load(self, parts: Mapping[str, Tensor]) -> None:
        """Store copies of ``parts``, which have been checked."""
        ...


def check_parts(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    if found.keys() != expected.keys():
        raise ValueError(f"it has the parts {sorted(found)}, expected {sorted(expected)}")
    for name, tensor in expected.items():
        got = found[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise ValueError(
                f"part {name!r} is {got.dtype} {list(got.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )


class BFloat16Weight:
    """The matrix rounded to bfloat16; exact if all its values are bfloat16 values, or under bfloat16 autocast."""

    def __init__(self, policy: Tensor) -> None:
        self._policy = policy
        self._weight = policy.detach().to(torch.bfloat16, copy=True)

    @property
    def scratch_numel(self) -> int:
        return self._weight.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"": self._weight}

    def refresh(self) -> None:
        self._weight.copy_(self._policy)

    def decode(self, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        return in_dtype(self._weight, dtype, scratch)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        check_parts(parts, self.tensors())

    def load(self, parts: Mapping[str, Tensor]) -> None:
        self._weight.copy_(parts[""])


class Int8Weight:
    """int8 codes with a scale, the largest magnitude / 127, for each group of ``GROUP`` neighbouring in-features.

    Groups never cross rows, so a matrix sharded by rows is encoded without communication. Scales are bfloat16, and
    codes are computed with the rounded scale: on Gaussian weights the error is 0.4 % larger than with float32 scales,
    which take 3 % more bytes. float16 would lose bits of scales below 6e-5, which belong to weights below 0.008.
    """

    GROUP = 64

    def __init__(self, policy: Tensor) -> None:
        self._policy = policy
        rows, self._columns = policy.shape
        self._group = min(self.GROUP, self._columns)
        groups = -(-self._columns // self._group)
        self._codes = torch.empty(rows, groups, self._group, dtype=torch.int8, device=policy.device)
        self._scales = torch.empty(rows, groups, dtype=torch.bfloat16, device=policy.device)
        self.refresh()

    @property
    def scratch_numel(self) -> int:
        return self._codes.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self._codes, "scales": self._scales}

    @torch.no_grad()
    def refresh(self) -> None:
        """Store the policy's current weight. A group with a non-finite weight gets such a scale, and decodes to NaN."""
        padding = -self._columns % self._group
        weight = F.pad(self._policy.float(), (0, padding)).view(self._codes.shape)
        self._scales.copy_(weight.abs().amax(dim=-1) / 127)
        divisor = self._scales.float().unsqueeze(-1)
        codes = (weight / divisor.where(divisor != 0, 1)).round_().clamp_(-127, 127)
        self._codes.copy_(codes.nan_to_num_(0))

    def decode(self, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        """Return the products of code and scale, rounded once."""
        weight = scratch.take(self._codes.shape, dtype, self._codes.device)
        torch.mul(self._codes, self._scales.to(dtype).unsqueeze(-1), out=weight)
        return weight.flatten(1)[:, : self._columns]

    def check(self, parts: Mapping[str, Tensor]) -> None:
        check_parts(parts, self.tensors())

    def load(self, parts: Mapping[str, Tensor]) -> None:
        self._codes.copy_(parts["codes"])
        self._scales.copy_(parts["scales"])


def in_dtype(weight: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Return the weight itself if it has the dtype, else a conversion in the scratch."""
    if weight.dtype == dtype:
        return weight
    return scratch.take(tuple(weight.shape), dtype, weight.device).copy_(weight)
