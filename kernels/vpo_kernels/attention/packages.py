"""The optional attention packages, which are imported by their exact symbols when first asked for, and never before.

``find_spec`` is not enough: an empty leftover folder satisfies it, and a build against another torch is found but
does not load.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PackageName = Literal["flash2", "flash3", "flash4", "xformers"]

HALF = (torch.float16, torch.bfloat16)
_ANY_SIZE = 1 << 16


@dataclass(frozen=True)
class Kernels:
    """The functions that a package computes attention with.

    dense: takes q, k, v [B, N, heads, D], returns [B, N, heads, D].
    packed: takes q [B, N, heads, D], k and v [tokens of all samples, heads, D] and a divider, returns
        [B, N, heads, D].
    divider: takes queries per sample, text lengths and device, returns what ``packed`` needs to tell the samples
        apart. It lies on the device and serves every call with these lengths.
    """

    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    packed: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    divider: Callable[[int, Sequence[int], torch.device], Any]


@dataclass(frozen=True)
class Limits:
    """The inputs that a package's kernels take.

    load: imports the package. dtypes: those that it takes.
    largest_head: the most channels of a head, by major compute capability; an absent one is not supported.
    head_multiple: the number of which the channels of a head must be a multiple.
    """

    load: Callable[[], Kernels]
    dtypes: tuple[torch.dtype, ...]
    largest_head: dict[int, int]
    head_multiple: int = 8


@dataclass(frozen=True)
class Offsets:
    """The places where samples begin, int32 [B + 1] with the total last, and the longest sample, for queries and
    text."""

    queries: Tensor
    text: Tensor
    longest_queries: int
    longest_text: int


def to_device(values: Sequence[int] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a host list or tensor to the device without waiting for the device."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def offsets(queries: int, lengths: Sequence[int], device: torch.device) -> Offsets:
    """Return the offsets of samples with ``queries`` video tokens each and ``lengths`` text tokens."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return Offsets(
        queries=to_device([sample * queries for sample in range(len(lengths) + 1)], torch.int32, device),
        text=to_device(ends, torch.int32, device),
        longest_queries=queries,
        longest_text=max(lengths),
    )


def flash_kernels(dense: Callable[..., Any], varlen: Callable[..., Any]) -> Kernels:
    """Wrap FlashAttention's two functions; versions differ in whether they return the log-sum-exp as well."""

    def run_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _output(dense(q, k, v))

    def run_packed(q: Tensor, k: Tensor, v: Tensor, ends: Offsets) -> Tensor:
        out = varlen(
            q.flatten(0, 1),
            k,
            v,
            cu_seqlens_q=ends.queries,
            cu_seqlens_k=ends.text,
            max_seqlen_q=ends.longest_queries,
            max_seqlen_k=ends.longest_text,
        )
        return _output(out).unflatten(0, (q.shape[0], -1))

    return Kernels(run_dense, run_packed, offsets)


def xformers_kernels(attend: Callable[..., Tensor], block_diagonal: Callable[..., Any]) -> Kernels:
    """Wrap ``memory_efficient_attention`` and ``BlockDiagonalMask.from_seqlens``."""

    def run_packed(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        out = attend(q.flatten(0, 1)[None], k[None], v[None], attn_bias=bias)
        return out[0].unflatten(0, (q.shape[0], -1))

    def divider(queries: int, lengths: Sequence[int], device: torch.device) -> Any:
        return block_diagonal([queries] * len(lengths), list(lengths), device=device)

    return Kernels(attend, run_packed, divider)


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _symbols(module: str, *names: str) -> list[Any]:
    loaded = importlib.import_module(module)
    missing = [name for name in names if not hasattr(loaded, name)]
    if missing:
        raise ImportError(f"{module} has no {missing[0]}")
    return [getattr(loaded, name) for name in names]


def _load_flash(module: str) -> Kernels:
    return flash_kernels(*_symbols(module, "flash_attn_func", "flash_attn_varlen_func"))


def _load_xformers() -> Kernels:
    (attend,) = _symbols("xformers.ops", "memory_efficient_attention")
    (block_diagonal,) = _symbols("xformers.ops.fmha.attn_bias", "BlockDiagonalMask")
    return xformers_kernels(attend, block_diagonal.from_seqlens)


_load_flash2 = functools.partial(_load_flash, "flash_attn")
_load_flash3 = functools.partial(_load_flash, "flash_attn_interface")
_load_flash4 = functools.partial(_load_flash, "flash_attn.cute")

PACKAGES: dict[PackageName, Limits] = {
    "flash2": Limits(_load_flash2, HALF, dict.fromkeys((8, 9, 10, 11, 12), 256)),
    "flash3": Limits(_load_flash3, HALF, dict.fromkeys((8, 9), 256)),
    "flash4": Limits(_load_flash4, HALF, {8: 128, 9: 256, 10: 128, 11: 128, 12: 128}),
    "xformers": Limits(
        _load_xformers, (*HALF, torch.float32), dict.fromkeys((7, 8, 9, 10, 11, 12), _ANY_SIZE)
    ),
}
assert set(PACKAGES) == set(get_args(PackageName))

_loaded: dict[str, Kernels] = {}


@functools.cache
def import_package(name: PackageName) -> str | None:
    """Import a package, once. Return None if it works here, else the reason why not, in one line."""
    try:
        _loaded[name] = PACKAGES[name].load()
    except ImportError as error:
        return _first_line(error) or type(error).__name__
    except Exception as error:  # a broken installation may raise anything, and the others must still be tried
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def kernels(name: str) -> Kernels:
    """Return the functions of a package that ``import_package`` has found to work; raise ValueError for another."""
    if name not in _loaded:
        raise ValueError(
            f"attention backend={name!r} has not been chosen in this process; pass the name that "
            "choose_attention(...) returns, or 'sdpa'"
        )
    return _loaded[name]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
