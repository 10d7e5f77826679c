"""The small fused operations around STDiT3's memory-bound parts: what they share.

Which backend an operation uses, checks of its arguments, and how token tensors and their modulations are laid
out for kernels. Nothing here needs triton.
"""

from __future__ import annotations

import math
import os
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

BackendName = Literal["auto", "reference", "triton"]


class Verdict(NamedTuple):
    """What ``backend="auto"`` takes for an operation on a CUDA tensor, and the measurement behind it."""

    backend: Literal["reference", "triton"]
    reason: str


AUTO: dict[str, Verdict] = {
    "modulated_norm": Verdict("reference", "not measured yet"),
    "gated_residual": Verdict("reference", "not measured yet"),
    "qk_norm_rope": Verdict("reference", "not measured yet"),
    "temporal_attention": Verdict("reference", "not measured yet"),
}
"""A kernel is taken only where a recorded GPU run (bench/test_companions.py) shows that it beats torch.compile of
the plain code by 10 %, or saves activation memory that compile does not."""


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter: then they take CPU tensors, for tests, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(operation: str, backend: str, tensor: Tensor) -> bool:
    """Whether ``operation`` on ``tensor`` goes to its kernel rather than to the plain formula.

    float64 always goes to the formula: the kernels' arithmetic is float32.
    """
    if backend not in get_args(BackendName):
        raise ValueError(
            f"backend={backend!r} of {operation} is unknown; it must be one of: "
            f"{', '.join(get_args(BackendName))}. Use backend='auto'"
        )
    if backend == "auto":
        backend = AUTO[operation].backend if tensor.is_cuda else "reference"
    if backend == "reference":
        return False
    if not tensor.is_cuda and not interpreted():
        raise ValueError(
            f"backend='triton' of {operation} got a tensor on {tensor.device}, but must get one on a CUDA "
            "device; use backend='auto', or set TRITON_INTERPRET=1 before triton is imported to test the "
            "kernel on a CPU"
        )
    return tensor.dtype != torch.float64


def runs_kernel(*tensors: Tensor) -> bool:
    """Whether a registered operation launches its kernel on these tensors, or computes the formula."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return tensors[0].is_cuda or interpreted()


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which formulas compute in the dtypes they are given."""
    return torch.autocast(tensor.device.type, enabled=False)


def promoted_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a sum of these tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_floats(operation: str, **tensors: Tensor) -> None:
    """Every tensor floating point and on the device of the first, or ValueError."""
    names = list(tensors)
    first = tensors[names[0]]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} of {operation} has dtype {tensor.dtype}, but must be floating point; "
                f"pass {name}.float()"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} of {operation} is on {tensor.device}, but must be where {names[0]} is, on "
                f"{first.device}; pass {name}.to({str(first.device)!r})"
            )


def check_modulation(operation: str, x: Tensor, **modulations: Tensor) -> None:
    """Every modulation broadcastable to x [..., C] with all C channels of its own, or ValueError."""
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"x of {operation} has shape {list(x.shape)}, but must be [..., C] with two dimensions or more "
            "and at least one element; give single rows as x[None]"
        )
    for name, tensor in modulations.items():
        fits = 1 <= tensor.ndim <= x.ndim and tensor.shape[-1] == x.shape[-1]
        ours = x.shape[x.ndim - tensor.ndim :]
        if not fits or any(size != 1 and size != full for size, full in zip(tensor.shape, ours, strict=True)):
            raise ValueError(
                f"{name} of {operation} has shape {list(tensor.shape)}, but must broadcast to that of x, "
                f"{list(x.shape)}, with all {x.shape[-1]} channels; for x [B, T, S, C] give "
                "[B, 1, 1, C] or [B, T, 1, C]"
            )


def grouped(x: Tensor, *modulations: Tensor) -> list[Tensor]:
    """Modulations as views [x.shape[:k], 1, ..., C], of the smallest k that tells apart what any of them does.

    So the rows of x fall into groups of neighbours that share all modulations, one group per modulation row.
    """
    full = [m[(None,) * (x.ndim - m.ndim)] for m in modulations]
    k = max([0] + [d + 1 for m in full for d in range(x.ndim - 1) if m.shape[d] != 1])
    shape = (*x.shape[:k], *[1] * (x.ndim - 1 - k), x.shape[-1])
    return [m.expand(shape) for m in full]


def new_like(tensor: Tensor, dimensions: int = 4) -> Tensor:
    """Uninitialised, in the tensor's order of dimensions where that keeps channels innermost, else contiguous.

    Only up to ``dimensions`` dimensions keep their order, so that ``as_rows`` (4) or ``as_sequences`` (5) of the
    result is a view.
    """
    out = torch.empty_like(tensor)
    keep = out.stride(-1) == 1 and out.ndim <= dimensions
    return out if keep else tensor.new_empty(tensor.shape)


class Rows(NamedTuple):
    """[..., C] tensors as rows of channels: row r is (b, t, s) = (r // (T * S), r // S % T, r % S)."""

    frames: int  # T
    patches: int  # S
    total: int  # B * T * S
    tensors: list[Tensor]  # each [B, T, S, C], channels at stride 1


def as_rows(*tensors: Tensor) -> Rows:
    """Views of equally shaped [..., C] tensors as [B, T, S, C]; copies of those that have no such view."""
    shape = tensors[0].shape
    lead = (*[1] * max(0, 4 - len(shape)), *shape[:-1])
    if len(lead) > 3:
        lead = (math.prod(lead[:-2]), *lead[-2:])
    if all(tensor.is_contiguous() for tensor in tensors):
        lead = (1, 1, math.prod(lead))
    views = []
    for tensor in tensors:
        view = tensor.reshape(*lead, shape[-1])
        views.append(view if view.stride(-1) == 1 else view.contiguous())
    count = math.prod(lead)
    assert count < 2**31, f"{count} rows need 64-bit row numbers"
    return Rows(lead[1], lead[2], count, views)


def modulation_rows(modulation: Tensor) -> Tensor:
    """[x.shape[:k], 1, ..., C] to [groups, C], channels at stride 1; a view where there is one."""
    rows = modulation.reshape(-1, modulation.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def as_sequences(tensor: Tensor) -> Tensor:
    """[..., N, heads, D] as [A, R, N, heads, D] with channels at stride 1: a view where there is one."""
    shape = (*[1] * max(0, 5 - tensor.ndim), *tensor.shape)
    shape = (math.prod(shape[:-4]), *shape[-4:])
    view = tensor.reshape(shape)
    assert math.prod(shape[:-1]) < 2**31, f"{shape} needs 64-bit head numbers"
    return view if view.stride(-1) == 1 else view.contiguous()


def alignment(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides every stride of [A, R, N, heads, D] tensors but the last."""
    return math.gcd(16, *[stride for tensor in tensors for stride in tensor.stride()[:-1]])
