"""Checks of the arguments of ``paired_dpo_loss``. Each error names argument, value, constraint and remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat, get_args

import torch
from torch import Tensor

from vpo_kernels.checks import check_device, check_floating
from vpo_kernels.paired_dpo.contract import Mask, Options, PerPair, Reduction, TargetNoise

_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
_REDUCTIONS = get_args(Reduction)  # here, because torch.compile of torch 2.6 does not know get_args
Given = SupportsFloat | Tensor
"""What users give for ``PerPair``: a number of Python or numpy, or a tensor of shape [], [1] or [P]."""


class Like(NamedTuple):
    """The shape and device that the other arguments must have: those of the winners' predictions."""

    name: str  # for errors
    shape: torch.Size  # [P, ...]
    device: torch.device


def check_tensors(named: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors, the policy's first, with all but the policy's detached.

    named: either those of ``PairTensors``, or batches [2P, ...] of policy, reference and target. Raise ValueError
    unless all are floating point tensors of one shape that is not empty, and on one device.
    """
    (name, first), *_ = named.items()
    like = Like(name, first.shape, first.device) if isinstance(first, Tensor) else None
    _, shape, device = like or (name, None, None)
    for each, tensor in named.items():
        fits = like is not None and isinstance(tensor, Tensor) and tensor.dtype in _DTYPES
        if not fits or tensor.shape != shape or tensor.device != device:
            _check_tensor(each, tensor, like)
    if first.ndim == 0 or first.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(first.shape)}, but must be {'[P, ...]' if len(named) == 6 else '[2P, ...]'} with "
            "at least one pair and one element; skip the step when no pair is left"
        )
    policies = len(named) // 3
    return [
        tensor if i < policies or not tensor.requires_grad else tensor.detach()
        for i, tensor in enumerate(named.values())
    ]


def check_batch(policy: Tensor) -> Like:
    """Return what fits the winners of a batch that ``check_tensors`` accepted; raise ValueError if it has no halves."""
    if policy.shape[0] % 2:
        raise ValueError(
            f"policy has shape {list(policy.shape)}, but must be [2P, ...], P winners and then their P losers; an odd "
            "number has no halves, so drop the sample without a partner"
        )
    return Like("half of policy", torch.Size([policy.shape[0] // 2, *policy.shape[1:]]), policy.device)


def _check_tensor(name: str, tensor: object, like: Like | None) -> None:
    """Raise ValueError unless ``tensor`` is a floating point tensor of the shape and on the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, but must be a tensor of floating point numbers")
    if tensor.dtype not in _DTYPES:
        kinds, remedy = (
            ("float16, bfloat16, float32 or float64", "bfloat16")
            if tensor.is_floating_point()
            else ("floating point", "float")
        )
        raise ValueError(f"{name} has dtype {tensor.dtype}, but must be {kinds}; pass {name}.{remedy}()")
    if like is None:
        return
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have that of {like.name}, "
            f"{list(like.shape)}; the loss does not broadcast, so expand or slice {name} first"
        )
    check_device(name, tensor, like.device, like.name)


def check_noise(noise: Tensor | None, scales: Sequence[Given] | None, like: Like) -> TargetNoise | None:
    """Return the noise that forms the targets, or None.

    Raise ValueError for noise that does not fit, for noise without scales, and the reverse.
    """
    if noise is None and scales is None:
        return None
    if noise is None or scales is None:
        given, missing = "target_noise", "target_scales"
        if noise is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given without {missing}; a target formed inside needs both")
    _check_tensor("target_noise", noise, like)
    if not isinstance(scales, tuple | list) or len(scales) != 2:
        raise ValueError(
            f"target_scales is {scales!r}, but must be two scales (a, b), of the clean latents and of the noise"
        )
    x0_scale, noise_scale = (
        check_per_pair(f"target_scales[{index}]", scale, like) for index, scale in enumerate(scales)
    )
    return TargetNoise(noise.detach(), x0_scale, noise_scale)


def _is_number(value: object) -> bool:
    """Return whether this is a finite real number of Python or numpy, and no bool."""
    real = isinstance(value, (int, float, numbers.Real))
    return real and not isinstance(value, bool) and -math.inf < value < math.inf  # type: ignore[operator]


def _check_beta(beta: Given, like: Like) -> PerPair:
    """Return beta. A tensor's values are not checked, which would make the host wait for the device."""
    if isinstance(beta, Tensor):
        return check_per_pair("beta", beta, like)
    if not _is_number(beta) or float(beta) <= 0:
        raise ValueError(
            f"beta={beta!r} must be a finite number above 0, or a tensor [P] (torch.as_tensor makes one of a list or "
            "an array); with reduction='mean' about 500 suits velocities"
        )
    return float(beta)


def check_options(
    like: Like,
    beta: Given,
    pair_weight: Given | None,
    reduction: Reduction,
    winner_anchor: SupportsFloat,
    loser_scaling: SupportsFloat | None,
) -> Options:
    """Return the numbers that shape the loss. Raise ValueError for one out of range."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"reduction={reduction!r} must be 'mean' or 'sum' (over the elements of a sample); "
            "the mean over pairs is always taken"
        )
    if not _is_number(winner_anchor) or float(winner_anchor) < 0:
        raise ValueError(
            f"winner_anchor={winner_anchor!r} must be a finite number of at least 0; 0 leaves the anchor out"
        )
    if loser_scaling is not None and not (_is_number(loser_scaling) and 0 <= float(loser_scaling) <= 1):
        raise ValueError(
            f"loser_scaling={loser_scaling!r} must be None or a number from 0 to 1; larger protects the "
            "winner more, None leaves the loser's gradient as it is"
        )
    return Options(
        _check_beta(beta, like),
        1.0 if pair_weight is None else check_per_pair("pair_weight", pair_weight, like),
        reduction,
        float(winner_anchor),
        None if loser_scaling is None else float(loser_scaling),
    )


def check_per_pair(name: str, value: Given, like: Like) -> PerPair:
    """Return a number for all pairs as a float, or a tensor as one of shape [P], detached; else raise ValueError."""
    pairs = like.shape[0]
    if not isinstance(value, Tensor):
        if _is_number(value):
            return float(value)
        raise ValueError(
            f"{name} is {value!r}, but must be a finite number or a tensor [{pairs}], one per pair; "
            "torch.as_tensor makes one of a list or an array"
        )
    if tuple(value.shape) not in ((), (1,), (pairs,)):
        raise ValueError(
            f"{name} is {list(value.shape)}, but must be a finite number or a tensor [{pairs}], one per pair; a weight "
            "per element belongs into the predictions and targets as its square root"
        )
    check_floating(name, value)
    check_device(name, value, like.device, like.name)
    return value.detach().expand(pairs)


def check_mask(mask: Tensor | None, like: Like) -> Tensor | None:
    """Return the mask with as many dimensions as ``like``, each of size 1 or ``like``'s; else raise ValueError."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask is {got}, but must be a bool tensor, True where an element counts; pass mask != 0"
        )
    check_device("mask", mask, like.device, like.name)
    dims = len(like.shape)
    fits = mask.ndim <= dims and all(
        size in (1, full) for size, full in zip(mask.shape, like.shape[dims - mask.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, but must broadcast to {list(like.shape)}; "
            "give it size 1 in every dimension that it does not tell apart"
        )
    return mask.reshape((1,) * (dims - mask.ndim) + tuple(mask.shape))


def expand_mask(mask: Tensor, shape: Sequence[int]) -> Mask:
    """Expand a checked mask to [P, ...]. Raise ValueError if it hides all elements of a pair.

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
