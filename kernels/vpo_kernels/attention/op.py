"""``attention`` and ``text_attention``, which models call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vpo_kernels.attention.choose import BackendName
from vpo_kernels.attention.packages import Offsets, kernels
from vpo_kernels.attention.text import TextPlan, plan_text

_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""The kernels of torch that never hold a matrix of scores; the remaining one, MATH, holds it."""
_GRID = 2**16 - 1
"""A CUDA grid has at most so many blocks along y and z, where FlashAttention 2 and cuDNN have samples."""
_SUMS = 2**31
"""FlashAttention 2 counts its float32 sums of dq in int32: in the backward pass more of them are written elsewhere."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: BackendName = "sdpa") -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v within each sample, without a mask, and never hold the [N, N] scores.

    q, k, v: [B, N, heads, D], any strides; views of one fused projection are read in place. Under autocast they are
        cast as autocast would cast them; otherwise they share a dtype.
    backend: a name that ``choose_attention`` returned, or ``sdpa``.

    Return [B, N, heads, D] in that dtype. The softmax is computed in float32 or better.

    On a GPU the one kernel of torch that holds scores is not allowed, so that it is never taken silently: raise
    RuntimeError where no other fits. float64 is the exception, because only that kernel computes it there. On a CPU
    torch takes its fused kernel for every float dtype. Raise ValueError for a backend that was not chosen before.
    """
    q, k, v = _as_autocast(q, k, v)
    return _dense(q, k, v, backend)


def text_attention(
    q: Tensor, k: Tensor, v: Tensor, text: TextPlan | Sequence[int], backend: BackendName = "sdpa"
) -> Tensor:
    """Let each sample's video tokens attend to that sample's text tokens, without computing on padding.

    q: [B, N, heads, D]. k, v: [tokens, heads, D], the valid text tokens of sample 0, of sample 1, ... with nothing
        between them. Dtypes are as for ``attention``.
    text: ``plan_text(...)``, or the number of tokens of each sample; a plan is then made for this call alone, with
        ``backend``, whereas a plan brings its own. Compiled code takes a plan made outside it, so that other lengths
        do not compile it again.

    Return [B, N, heads, D]. A sample's result does not depend on the other samples beyond rounding. Raise ValueError
    where q, k or v have other sizes than the plan.
    """
    q, k, v = _as_autocast(q, k, v)
    if not isinstance(text, TextPlan):
        text = plan_text(
            text,
            queries=q.shape[1],
            device=q.device,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            backend=backend,
        )
    _check_sizes(q, k, v, text)
    if text.way == "packed":
        if text.backend == "sdpa":
            return _varlen(q, k, v, text.divider)
        return kernels(text.backend).packed(q, k, v, text.divider)
    if text.way == "dense":
        k, v = (tensor.unflatten(0, (q.shape[0], -1)) for tensor in (k, v))
        return _dense(q, k, v, text.backend)
    if text.way == "masked":
        assert text.places is not None
        k, v = (tensor.index_select(0, text.places).unflatten(0, (q.shape[0], -1)) for tensor in (k, v))
        return _sdpa(q, k, v, text.counts)
    return _runs(q, k, v, text.runs)


def attention_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which attention over tensors like x is computed: x's own, or autocast's."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast does, which the packages' functions would not; without autocast leave the dtypes as they are."""
    dtype = attention_dtype(q)
    if dtype == q.dtype == k.dtype == v.dtype or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check_sizes(q: Tensor, k: Tensor, v: Tensor, text: TextPlan) -> None:
    """Raise ValueError unless the tensors have the sizes that the text was planned for."""
    if q.shape[0] != text.batch_size or q.shape[1] != text.queries:
        raise ValueError(
            f"q is {list(q.shape)}, but the text is planned for [{text.batch_size}, {text.queries}, heads, D]; "
            "plan it again for this batch size and these tokens"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (text.tokens, *q.shape[2:]):
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected packed text {[text.tokens, *q.shape[2:]]}: the valid "
                "tokens of every sample one after the other, without padding"
            )


def _without_scores(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return a context in which torch does not take the kernel that holds scores."""
    return sdpa_kernel(_FUSED) if device.type == "cuda" and dtype != torch.float64 else nullcontext()


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: BackendName) -> Tensor:
    """Attend within each sample, on a GPU in as many calls as its kernels need, whose parts are as equal as can be."""
    attend = _sdpa if backend == "sdpa" else kernels(backend).dense
    most = _samples_at_once(q, torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    if most is None or len(q) <= most:
        return attend(q, k, v)
    calls = -(-len(q) // most)
    parts = zip(*(x.tensor_split(calls) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*part) for part in parts])


def _samples_at_once(q: Tensor, backward: bool) -> int | None:
    """Return how many samples like those of q [B, N, heads, D] a kernel of its device takes; None sets no limit.

    The backward pass of FlashAttention 2 rounds N up to 128 and D up to 32 (flash_api.cpp, mha_bwd). Without one, as
    in rollouts, only the grid sets a limit.
    """
    if q.device.type == "cpu":
        return None
    if not backward:
        return _GRID
    tokens, heads, channels = q.shape[1:]
    sums = heads * (-(-tokens // 128) * 128) * (-(-channels // 32) * 32)
    return max(1, min(_GRID, _SUMS // sums))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None = None) -> Tensor:
    # Fused kernels take heads before tokens, and need the channels of a head side by side.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with _without_scores(q.device, q.dtype):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=counts).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Offsets) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # loads torch.compile, so only where it is called

    out = varlen_attn(q.flatten(0, 1), k, v, ends.queries, ends.text, ends.longest_queries, ends.longest_text)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (q.shape[0], -1))


def _runs(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Attend with one call per run (samples, length)."""
    queries = q.split([samples for samples, _ in runs])
    keys, values = (tensor.split([samples * length for samples, length in runs]) for tensor in (k, v))
    parts = [
        _sdpa(q, k.unflatten(0, run), v.unflatten(0, run))
        for q, k, v, run in zip(queries, keys, values, runs, strict=True)
    ]
    return torch.cat(parts)
