"""Plans by which video samples attend to captions of different lengths without computing on padding."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vpo_kernels.attention.choose import BackendName
from vpo_kernels.attention.packages import HALF, kernels, offsets, to_device

MASKED_WASTE = 0.25
"""Up to this share of padding, one masked call over padded text is made rather than a call per length. On a CPU
the two cost the same up to about a third (64 samples of 80 queries, 8 samples of 1620); beyond a half, padding costs
more."""

Way = Literal["dense", "masked", "runs", "packed"]


@dataclass(frozen=True)
class TextPlan:
    """A prepared batch of captions, made once and used by every block and every sampling step.

    Text tokens are packed: those of sample 0, of sample 1, ..., [tokens, ...], with nothing between them.

    backend: the backend whose kernels run.
    way: ``dense``: all captions are equally long, one call. ``packed``: one variable-length call. ``masked``: one
        call over text padded to the longest caption, under a mask. ``runs``: one call per run of neighbouring samples
        of equal length; runs rather than scattered groups, so that queries are read in place.
    batch_size, queries, tokens: number of video samples, of video tokens of each, of text tokens of all.
    runs: (samples, length) of each run, in order.
    divider: for ``packed``, what tells the backend where samples begin.
    places, counts: for ``masked``, int64 [batch_size * longest], the token in each padded place; and bool
        [batch_size, 1, 1, longest], True where a token counts.
    """

    backend: BackendName
    way: Way
    batch_size: int
    queries: int
    tokens: int
    runs: tuple[tuple[int, int], ...] = ()
    divider: Any = None
    places: Tensor | None = None
    counts: Tensor | None = None


def plan_text(
    lengths: Sequence[int],
    *,
    queries: int,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    backend: BackendName = "sdpa",
) -> TextPlan:
    """Prepare attention to text of ``lengths`` tokens per sample from ``queries`` video tokens per sample.

    ``lengths`` are host integers, so that the host does not wait for the device. device, dtype and head_dim are those
    of the attention's inputs. Raise ValueError for no sample, and for a sample without a token, whose softmax would be
    over nothing.
    """
    if not lengths:
        raise ValueError("text lengths are empty, but there must be at least one sample; skip an empty batch")
    for sample, length in enumerate(lengths):
        if length < 1:
            raise ValueError(
                f"the text of sample {sample} has {length} tokens, but must have at least 1; encode an empty caption "
                "as its end-of-text token"
            )
    samples, tokens, longest = len(lengths), sum(lengths), max(lengths)
    if samples * longest == tokens:
        return TextPlan(backend, "dense", samples, queries, tokens)
    if backend != "sdpa":
        divider = kernels(backend).divider(queries, lengths, device)
        return TextPlan(backend, "packed", samples, queries, tokens, divider=divider)
    if _has_varlen(device, dtype, head_dim):
        # Activation checkpointing keeps results of operators by name, so this one must be there before the first call.
        importlib.import_module("torch.nn.attention.varlen")
        return TextPlan(
            backend, "packed", samples, queries, tokens, divider=offsets(queries, lengths, device)
        )
    if tokens < (1 - MASKED_WASTE) * samples * longest:
        return TextPlan(backend, "runs", samples, queries, tokens, runs=_runs(lengths))
    places = [place for sample in _padded_places(lengths, longest) for place in sample]
    counts = [place < length for length in lengths for place in range(longest)]
    return TextPlan(
        backend,
        "masked",
        samples,
        queries,
        tokens,
        places=to_device(places, torch.int64, device),
        counts=to_device(counts, torch.bool, device).view(samples, 1, 1, longest),
    )


def text_places(mask: Tensor, device: torch.device) -> Tensor:
    """Return where the tokens that count stand in a padded text: int64 on ``device``, sample after sample.

    mask: bool [B, L] on the CPU; it may have holes. ``text.flatten(0, 1).index_select(0, places)`` packs [B, L, ...]
    for ``text_attention``, with ``lengths = mask.sum(1).tolist()``. The host does not wait for the device.
    """
    return to_device(mask.flatten().nonzero()[:, 0], torch.int64, device)


def _has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether torch's own variable-length call (FlashAttention's kernel) takes such tensors."""
    if device.type != "cuda" or dtype not in HALF or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (samples, length) of each run of neighbours of equal length."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return tuple(runs)


def _padded_places(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Return, per sample, the packed token in each place of the padded text; padding repeats the first token."""
    places, start = [], 0
    for length in lengths:
        places.append([*range(start, start + length), *[start] * (longest - length)])
        start += length
    return places
