"""``paired_dpo_loss``: checks, choice of backend, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from vpo_kernels.paired_dpo import reference
from vpo_kernels.paired_dpo.reference import PairedDPOLoss, Reduction, Sextet

BackendName = Literal["auto", "reference", "native", "triton"]


class Backend(Protocol):
    """What computes the loss. ``reference.py`` is the contract of both functions."""

    def forward(
        self,
        tensors: Sextet,
        *,
        beta: float,
        reduction: Reduction,
        pair_weight: Tensor | None,
        mask: Tensor | None,
        counts: list[int],
    ) -> tuple[PairedDPOLoss, Tensor]: ...

    def gradient(
        self, policy: Tensor, target: Tensor, coefficient: Tensor, mask: Tensor | None
    ) -> Tensor: ...


def _load_reference() -> Backend:
    return reference


_LOADERS: dict[str, Callable[[], Backend]] = {"reference": _load_reference}
"""Backends of this installation. A loader imports its backend when it is first chosen, not before."""


def _choose_backend(name: str) -> Backend:
    if name == "auto":
        name = "reference"
    if name not in _LOADERS:
        known = name in get_args(BackendName)
        raise ValueError(
            f"backend={name!r} is {'not part of this installation' if known else 'unknown'}; "
            f"it must be one of: auto, {', '.join(_LOADERS)}. Use backend='auto'"
        )
    return _LOADERS[name]()


class _Gradient(torch.autograd.Function):
    """The first derivative, as a function of its own: asking for a second one is an error, not zero."""

    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, target: Tensor, coefficient: Tensor, mask: Tensor | None, backend: Backend
    ) -> Tensor:
        return backend.gradient(policy, target, coefficient, mask)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "paired_dpo_loss has no second derivative; differentiate without create_graph=True, or write the "
            "loss out in torch (vpo_kernels/paired_dpo/reference.py has the formula)"
        )


class _PairedDPO(torch.autograd.Function):
    """Saves the policy predictions, the targets and one number per pair; no elementwise temporaries."""

    @staticmethod
    def forward(
        ctx: Any,
        policy_winner: Tensor,
        policy_loser: Tensor,
        constants: tuple[Tensor, Tensor, Tensor, Tensor],  # reference_winner, _loser, target_winner, _loser
        beta: float,
        reduction: Reduction,
        pair_weight: Tensor | None,
        mask: Tensor | None,
        counts: list[int],
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        tensors = Sextet(policy_winner, policy_loser, *constants)
        out, coefficient = backend.forward(
            tensors, beta=beta, reduction=reduction, pair_weight=pair_weight, mask=mask, counts=counts
        )
        ctx.save_for_backward(
            policy_winner, policy_loser, tensors.target_winner, tensors.target_loser, coefficient, mask
        )
        ctx.backend = backend
        ctx.mark_non_differentiable(out.margin, out.winner_gap, out.loser_gap)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        policy_winner, policy_loser, target_winner, target_loser, coefficient, mask = ctx.saved_tensors
        coefficient = coefficient * grad_loss
        winner = loser = None
        if ctx.needs_input_grad[0]:
            winner = _Gradient.apply(policy_winner, target_winner, coefficient, mask, ctx.backend)
        if ctx.needs_input_grad[1]:
            loser = _Gradient.apply(policy_loser, target_loser, -coefficient, mask, ctx.backend)
        return winner, loser, *[None] * 7


def _check_tensors(tensors: Sextet) -> None:
    first = tensors.policy_winner
    for name, tensor in zip(Sextet._fields, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {type(tensor).__name__}, but must be a tensor [P, ...]")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, but must be floating point; pass {name}.float()"
            )
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but must have that of policy_winner, "
                f"{list(first.shape)}; the loss does not broadcast, so expand or slice {name} first"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but must be where policy_winner is, on {first.device}; "
                f"pass {name}.to({str(first.device)!r})"
            )
    if first.ndim == 0 or first.numel() == 0:
        raise ValueError(
            f"policy_winner has shape {list(first.shape)}, but must be [P, ...] with at least one pair "
            "and one element; skip the step when no pair is left"
        )


def _check_scalars(beta: float, reduction: str) -> None:
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not (0 < beta < math.inf):
        raise ValueError(
            f"beta={beta!r} must be a finite number above 0; with reduction='mean' about 500 suits velocities"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction={reduction!r} must be 'mean' or 'sum' (over the elements of a sample); "
            "the mean over pairs is always taken"
        )


def _check_pair_weight(pair_weight: Tensor | None, like: Tensor) -> Tensor | None:
    if pair_weight is None:
        return None
    if not isinstance(pair_weight, Tensor) or tuple(pair_weight.shape) != (like.shape[0],):
        got = list(pair_weight.shape) if isinstance(pair_weight, Tensor) else type(pair_weight).__name__
        raise ValueError(
            f"pair_weight is {got}, but must be a tensor [{like.shape[0]}], one weight per pair; "
            "a weight per element belongs into the predictions and targets as its square root"
        )
    if not pair_weight.is_floating_point():
        raise ValueError(
            f"pair_weight has dtype {pair_weight.dtype}, but must be floating point; pass pair_weight.float()"
        )
    if pair_weight.device != like.device:
        raise ValueError(
            f"pair_weight is on {pair_weight.device}, but must be where policy_winner is, on {like.device}; "
            f"pass pair_weight.to({str(like.device)!r})"
        )
    return pair_weight.detach()


def _check_mask(mask: Tensor | None, like: Tensor) -> tuple[Tensor | None, list[int]]:
    """The mask expanded to ``like``'s shape (a view), and the elements that count in each pair.

    Looks at the mask's values, so the host waits for the device; without a mask it does not.
    """
    if mask is None:
        return None, reference.counted_elements(None, like.shape)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask is {got}, but must be a bool tensor, True where an element counts; pass mask != 0"
        )
    if mask.device != like.device:
        raise ValueError(
            f"mask is on {mask.device}, but must be where policy_winner is, on {like.device}; "
            f"pass mask.to({str(like.device)!r})"
        )
    try:
        expanded = mask.expand(like.shape)
    except RuntimeError as error:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, but must broadcast to {list(like.shape)}; "
            "give it size 1 in every dimension that it does not tell apart"
        ) from error
    counts = reference.counted_elements(expanded, like.shape)
    for pair, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"mask leaves pair {pair} of {like.shape[0]} no element that counts, but must leave it "
                "at least one; drop the pair from the batch or unmask some of it"
            )
    return expanded, counts


def paired_dpo_loss(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    beta: float = 500.0,
    reduction: Reduction = "mean",
    pair_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: BackendName = "auto",
) -> PairedDPOLoss:
    """The Diffusion-DPO loss of P winner and loser pairs.

    The six tensors are [P, ...], of one shape and on one device, of any float dtypes and strides: what the
    policy and the frozen reference predict for the noised winner and loser, and what they should have
    predicted. Results are float32, float64 when an input is float64. Gradients reach the two policy
    predictions only, through ``loss``, in their own dtypes; ``margin`` and the gaps carry no graph, and
    everything else is constant. Repeatable bit for bit; a pair's margin and gaps do not depend on the rest
    of the batch. NaN in, NaN out. A second derivative raises RuntimeError.

    beta: strength of the pull towards the reference. It multiplies half the difference of the gaps, so it has
        another size under ``reduction="sum"``: beta_sum = beta_mean / n for n elements per sample.
    reduction: a sample's error is the mean over its counted elements, or their sum.
    pair_weight: [P], multiplies each pair's loss outside the sigmoid. Not normalised: the mean is over P.
    mask: bool, broadcastable to [P, ...], True counts; winner and loser share it. What it hides may be NaN.
    backend: ``auto``, or the name of one that this installation has.

    Raises ValueError, naming argument, value, constraint and remedy, for whatever does not fit: differing
    shapes or devices, an empty batch, a beta that is not finite and positive, a pair that the mask hides
    altogether.
    """
    tensors = Sextet(
        policy_winner, policy_loser, reference_winner, reference_loser, target_winner, target_loser
    )
    _check_tensors(tensors)
    _check_scalars(beta, reduction)
    weight = _check_pair_weight(pair_weight, policy_winner)
    expanded_mask, counts = _check_mask(mask, policy_winner)
    constants = tuple(tensor.detach() for tensor in tensors[2:])
    result = _PairedDPO.apply(
        policy_winner,
        policy_loser,
        constants,
        float(beta),
        reduction,
        weight,
        expanded_mask,
        counts,
        _choose_backend(backend),
    )
    return PairedDPOLoss(*cast("tuple[Tensor, ...]", result))
