"""The paired diffusion-DPO loss in plain torch: the formula, its gradient, the oracle of every other backend.

Diffusion-DPO (arXiv 2311.12908, eq. 14; SalesforceAIResearch/DiffusionDPO, ``train.py``), constant weighting:

    gap(x)  = mean over elements of (m - target)^2 - (r - target)^2    m: policy, r: reference prediction
    margin  = -(beta / 2) * (gap(winner) - gap(loser))
    loss    = mean over pairs of pair_weight * -log sigmoid(margin)

Two squared errors of nearly equal size would cancel, so the gap is (m - r) * (m + r - 2 * target).
Arithmetic on elements is float32 (float64 when an input is float64), on the few numbers per pair float64.
Pairs are worked on one by one: temporaries are one sample large, and a pair's bits depend neither on its
neighbours nor on strides.

Shapes: P pairs; a prediction is [P, ...] with n elements per sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Reduction = Literal["mean", "sum"]


class PairedDPOLoss(NamedTuple):
    """float32, or float64 when an input was float64. Gradients flow through ``loss`` only."""

    loss: Tensor  # scalar: mean over pairs of pair_weight * -logsigmoid(margin)
    margin: Tensor  # [P]: -(beta / 2) * (winner_gap - loser_gap)
    winner_gap: Tensor  # [P]: error(policy, winner) - error(reference, winner)
    loser_gap: Tensor  # [P]: the same of the loser


class Sextet(NamedTuple):
    """The six tensors of the loss, each [P, ...]."""

    policy_winner: Tensor
    policy_loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor
    target_winner: Tensor
    target_loser: Tensor


def arithmetic_dtype(tensors: Sextet) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def counted_elements(mask: Tensor | None, shape: torch.Size) -> list[int]:
    """Elements that count in each sample of a [P, ...] tensor, given a bool mask expanded to it."""
    if mask is None:
        return [shape[1:].numel()] * shape[0]
    return torch.stack([sample.sum() for sample in mask]).tolist()


def error_gap(
    policy: Tensor, reference: Tensor, target: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sum over the counted elements of (policy - target)^2 - (reference - target)^2, [P], in ``dtype``."""
    gaps = []
    for pair in range(policy.shape[0]):
        m, r, target_p = policy[pair].to(dtype), reference[pair].to(dtype), target[pair].to(dtype)
        term = (m - r) * (m + r - 2 * target_p)
        if mask is not None:
            term = term.masked_fill_(~mask[pair], 0)
        gaps.append(term.reshape(-1).sum())  # reshape: the order of summation is the logical one
    return torch.stack(gaps)


def forward(
    tensors: Sextet,
    *,
    beta: float,
    reduction: Reduction,
    pair_weight: Tensor | None,
    mask: Tensor | None,
    counts: list[int],
) -> tuple[PairedDPOLoss, Tensor]:
    """The loss, and the coefficient [P] that ``gradient`` needs.

    pair_weight: [P] or None. mask: bool, expanded to the inputs' shape, or None. counts: its True elements
    per pair, at least one each. The coefficient is d loss / d (the winner's squared error, summed over
    elements); the loser's is its negative.
    """
    dtype = arithmetic_dtype(tensors)
    winner_gap = error_gap(tensors[0], tensors[2], tensors[4], mask, dtype)
    loser_gap = error_gap(tensors[1], tensors[3], tensors[5], mask, dtype)
    slope = torch.full_like(winner_gap, beta / 2, dtype=torch.float64)
    if reduction == "mean":
        elements = torch.tensor(counts, device=winner_gap.device)
        winner_gap, loser_gap, slope = winner_gap / elements, loser_gap / elements, slope / elements
    weight = torch.ones_like(slope) if pair_weight is None else pair_weight.to(torch.float64)
    margin = beta / 2 * (loser_gap.double() - winner_gap.double())
    loss = -(weight * logsigmoid(margin)).mean()
    coefficient = slope * weight * torch.sigmoid(-margin) / len(counts)
    return PairedDPOLoss(loss.to(dtype), margin.to(dtype), winner_gap, loser_gap), coefficient


def gradient(policy: Tensor, target: Tensor, coefficient: Tensor, mask: Tensor | None) -> Tensor:
    """coefficient * 2 * (policy - target), zero where the mask is False: [P, ...], in the policy's dtype.

    coefficient: [P], float64.
    """
    is_double = torch.float64 in (policy.dtype, target.dtype)
    dtype = torch.float64 if is_double else torch.float32
    factor = (2 * coefficient).to(dtype)
    grad = torch.empty_like(policy)
    for pair in range(policy.shape[0]):
        step = (policy[pair].to(dtype) - target[pair].to(dtype)).mul_(factor[pair])
        if mask is not None:
            step = step.masked_fill_(~mask[pair], 0)
        grad[pair] = step
    return grad
