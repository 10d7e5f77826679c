"""What ``paired_dpo_loss`` refuses, in words: argument, value, constraint, remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from vpo_kernels.paired_dpo.contract import Mask, PerPair, Reduction

_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def check_tensors(named: Sequence[tuple[str, object]]) -> None:
    """All are floating point tensors of the first one's shape, [P, ...] and not empty, and on its device."""
    first = named[0][1]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {type(tensor).__name__}, but must be a tensor [P, ...]")
        if tensor.dtype not in _DTYPES:
            kinds, remedy = (
                ("float16, bfloat16, float32 or float64", "bfloat16")
                if tensor.is_floating_point()
                else ("floating point", "float")
            )
            raise ValueError(f"{name} has dtype {tensor.dtype}, but must be {kinds}; pass {name}.{remedy}()")
        assert isinstance(first, Tensor)
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but must have that of policy_winner, "
                f"{list(first.shape)}; the loss does not broadcast, so expand or slice {name} first"
            )
        check_device(name, tensor, first)
    assert isinstance(first, Tensor)
    if first.ndim == 0 or first.numel() == 0:
        raise ValueError(
            f"policy_winner has shape {list(first.shape)}, but must be [P, ...] with at least one pair "
            "and one element; skip the step when no pair is left"
        )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but must be where policy_winner is, on {like.device}; "
            f"pass {name}.to({str(like.device)!r})"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def check_beta(beta: PerPair, like: Tensor) -> PerPair:
    """A tensor's values are not looked at, which would make the host wait for the device."""
    if isinstance(beta, Tensor):
        return check_per_pair("beta", beta, like)
    if not _is_number(beta) or beta <= 0:
        raise ValueError(
            f"beta={beta!r} must be a finite number above 0, or a tensor [P]; with reduction='mean' about 500 "
            "suits velocities"
        )
    return float(beta)


def check_options(reduction: str, winner_anchor: float, loser_scaling: float | None) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction={reduction!r} must be 'mean' or 'sum' (over the elements of a sample); "
            "the mean over pairs is always taken"
        )
    if not _is_number(winner_anchor) or winner_anchor < 0:
        raise ValueError(
            f"winner_anchor={winner_anchor!r} must be a finite number of at least 0; 0 leaves the anchor out"
        )
    if loser_scaling is not None and not (_is_number(loser_scaling) and 0 <= loser_scaling <= 1):
        raise ValueError(
            f"loser_scaling={loser_scaling!r} must be None or a number from 0 to 1; larger protects the "
            "winner more, None leaves the loser's gradient as it is"
        )


def check_per_pair(name: str, value: PerPair, like: Tensor) -> PerPair:
    """A finite number, or a floating point tensor [P] on the right device; constant in the graph."""
    pairs = like.shape[0]
    if _is_number(value):
        assert not isinstance(value, Tensor)
        return float(value)
    if not isinstance(value, Tensor) or tuple(value.shape) != (pairs,):
        got = list(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} is {got}, but must be a finite number or a tensor [{pairs}], one per pair; a weight per "
            "element belongs into the predictions and targets as its square root"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}, but must be floating point; pass {name}.float()")
    check_device(name, value, like)
    return value.detach()


def check_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask with as many dimensions as ``like``, each of size 1 or ``like``'s."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask is {got}, but must be a bool tensor, True where an element counts; pass mask != 0"
        )
    check_device("mask", mask, like)
    fits = mask.ndim <= like.ndim and all(
        size in (1, full) for size, full in zip(mask.shape[::-1], like.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, but must broadcast to {list(like.shape)}; "
            "give it size 1 in every dimension that it does not tell apart"
        )
    return mask.reshape((1,) * (like.ndim - mask.ndim) + tuple(mask.shape))


def expand_mask(mask: Tensor, shape: Sequence[int]) -> Mask:
    """A checked mask over [P, ...]; ValueError if it hides a pair altogether.

    Looking for such a pair makes the host wait for the device, except while a CUDA graph is captured.
    """
    pairs, per_sample = shape[0], math.prod(shape[1:])
    counts = mask.reshape(mask.shape[0], -1).sum(1) * (per_sample // math.prod(mask.shape[1:]))
    counts = counts.expand(pairs)
    if not (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        smallest, pair = counts.min(0)
        if int(smallest) == 0:
            raise ValueError(
                f"mask leaves pair {int(pair)} of {pairs} no element that counts, but must leave it "
                "at least one; drop the pair from the batch or unmask some of it"
            )
    return Mask(mask.expand(*shape), counts)
