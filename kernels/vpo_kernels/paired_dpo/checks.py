"""Checks of the arguments of ``paired_dpo_loss``. Each error names argument, value, constraint and remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from vpo_kernels.checks import check_device, check_floating
from vpo_kernels.paired_dpo.contract import Mask, Options, PairTensors, PerPair, Reduction, TargetNoise

_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def check_tensors(tensors: PairTensors, target_noise: Tensor | None) -> PairTensors:
    """Return the tensors with all but the policy's detached.

    Raise ValueError unless all, and the noise if there is one, are floating point tensors of one shape [P, ...] that
    is not empty, and on one device.
    """
    first = tensors.policy_winner
    named: list[tuple[str, object]] = list(zip(PairTensors._fields, tensors, strict=True))
    if target_noise is not None:
        named.append(("target_noise", target_noise))
    for name, tensor in named:
        _check_tensor(name, tensor, first)
    if first.ndim == 0 or first.numel() == 0:
        raise ValueError(
            f"policy_winner has shape {list(first.shape)}, but must be [P, ...] with at least one pair "
            "and one element; skip the step when no pair is left"
        )
    return PairTensors(*tensors.policy, *(tensor.detach() for tensor in tensors[2:]))


def _check_tensor(name: str, tensor: object, first: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is a floating point tensor of the shape and on the device of ``first``."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, but must be a tensor [P, ...]")
    if tensor.dtype not in _DTYPES:
        kinds, remedy = (
            ("float16, bfloat16, float32 or float64", "bfloat16")
            if tensor.is_floating_point()
            else ("floating point", "float")
        )
        raise ValueError(f"{name} has dtype {tensor.dtype}, but must be {kinds}; pass {name}.{remedy}()")
    if tensor.shape != first.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have that of policy_winner, "
            f"{list(first.shape)}; the loss does not broadcast, so expand or slice {name} first"
        )
    check_device(name, tensor, first, "policy_winner")


def check_noise(
    noise: Tensor | None, scales: tuple[PerPair, PerPair] | None, like: Tensor
) -> TargetNoise | None:
    """Return the noise that forms the targets, or None. Raise ValueError for noise without scales, or the reverse.

    ``check_tensors`` looks at the noise itself. like: the winner's prediction.
    """
    if noise is None and scales is None:
        return None
    if noise is None or scales is None:
        given, missing = "target_noise", "target_scales"
        if noise is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given without {missing}; a target formed inside needs both")
    x0_scale, noise_scale = (
        check_per_pair(f"target_scales[{index}]", scale, like) for index, scale in enumerate(scales)
    )
    return TargetNoise(noise.detach(), x0_scale, noise_scale)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _check_beta(beta: PerPair, like: Tensor) -> PerPair:
    """Return beta. A tensor's values are not checked, which would make the host wait for the device."""
    if isinstance(beta, Tensor):
        return check_per_pair("beta", beta, like)
    if not _is_number(beta) or beta <= 0:
        raise ValueError(
            f"beta={beta!r} must be a finite number above 0, or a tensor [P]; with reduction='mean' about 500 "
            "suits velocities"
        )
    return float(beta)


def check_options(
    like: Tensor,
    beta: PerPair,
    pair_weight: Tensor | None,
    reduction: Reduction,
    winner_anchor: float,
    loser_scaling: float | None,
) -> Options:
    """Return the numbers that shape the loss. Raise ValueError for one out of range.

    like: the winner's prediction.
    """
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
    if pair_weight is not None and not isinstance(pair_weight, Tensor):
        raise ValueError(f"pair_weight is {pair_weight!r}, but must be a tensor [P], one weight per pair")
    return Options(
        _check_beta(beta, like),
        1.0 if pair_weight is None else check_per_pair("pair_weight", pair_weight, like),
        reduction,
        float(winner_anchor),
        None if loser_scaling is None else float(loser_scaling),
    )


def check_per_pair(name: str, value: PerPair, like: Tensor) -> PerPair:
    """Return a finite number, or a floating point tensor [P] on the right device, detached; else raise ValueError."""
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
    check_floating(name, value)
    check_device(name, value, like, "policy_winner")
    return value.detach()


def check_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the mask with as many dimensions as ``like``, each of size 1 or ``like``'s; else raise ValueError."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask is {got}, but must be a bool tensor, True where an element counts; pass mask != 0"
        )
    check_device("mask", mask, like, "policy_winner")
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
