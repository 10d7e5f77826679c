"""The paired diffusion-DPO loss in plain torch: the formula, its gradient, and what every other backend must equal.

Diffusion-DPO (arXiv 2311.12908, eq. 14; SalesforceAIResearch/DiffusionDPO, ``train.py``), constant weighting:

    error(m, x)     = mean over elements of (m - target)^2                   m: a prediction for x
    error_change(x) = error(policy, x) - error(reference, x)
    margin          = -(beta / 2) * (error_change(winner) - error_change(loser))
    loss            = mean over pairs of pair_weight * (-log sigmoid(margin) + winner_anchor * error(policy, winner))

Two squared errors of nearly equal size would cancel, so an error change is the mean of (m - r) * (m + r - 2 * target),
where r is the reference's prediction.

Loser scaling (Diffusion-SDPO, arXiv 2511.03317) leaves the loss as it is and multiplies the loser's gradient by

    min(1, max(0, (1 - mu) * |a|^2 / (a . b))) where a . b > 0, else 1     a, b: policy - target of winner, loser

so that, to first order in the predictions, the winner's error does not grow.

Pairs are computed one by one: temporaries are one sample large, and a pair's results depend neither on its neighbours
nor on strides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vpo_kernels.paired_dpo.contract import (
    Forward,
    GradientInputs,
    Mask,
    Options,
    PairTensors,
    PerPair,
    TargetNoise,
)
from vpo_kernels.registration import arithmetic_dtype


def per_pair(value: PerPair, pairs: int, device: torch.device) -> Tensor:
    """Return a number, or a tensor [P], as float64 [P]."""
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.full((pairs,), value, dtype=torch.float64, device=device)


class _Targets:
    """Targets formed sample by sample, so that no tensor of all of them exists."""

    def __init__(
        self, noise: TargetNoise | None, pairs: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._noise, self._dtype = noise, dtype
        if noise is not None:
            self._x0_scale = per_pair(noise.x0_scale, pairs, device).to(dtype)
            self._noise_scale = per_pair(noise.noise_scale, pairs, device).to(dtype)

    def sample(self, target: Tensor, pair: int) -> Tensor:
        x0 = target[pair].to(self._dtype)
        if self._noise is None:
            return x0
        return self._x0_scale[pair] * x0 + self._noise_scale[pair] * self._noise.noise[pair].to(self._dtype)


def _sum(values: Tensor, counted: Tensor | None) -> Tensor:
    """Sum the counted elements in logical order, for which they are made contiguous first."""
    if counted is not None:
        values = values.masked_fill(~counted, 0)
    return values.reshape(-1).sum()


def _pair_sums(
    tensors: PairTensors, targets: _Targets, pair: int, counted: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return [7]: sums over the counted elements of one pair.

    They are both error changes, the four errors in the order of ``PairedDPOLoss``, and a . b.
    """
    policy_w, policy_l, reference_w, reference_l = (t[pair].to(dtype) for t in tensors[:4])
    target_w, target_l = (targets.sample(target, pair) for target in tensors.target)
    change_w = (policy_w - reference_w) * (policy_w + reference_w - 2 * target_w)
    change_l = (policy_l - reference_l) * (policy_l + reference_l - 2 * target_l)
    a, b = policy_w - target_w, policy_l - target_l
    errors = a * a, b * b, (reference_w - target_w).square(), (reference_l - target_l).square()
    return torch.stack([_sum(values, counted) for values in (change_w, change_l, *errors, a * b)])


def finish(sums: Tensor, elements: Tensor, options: Options, dtype: torch.dtype) -> Forward:
    """Compute results and coefficients from sums over elements [7, P] and the numbers of elements [P].

    The sums are those of ``_pair_sums``.
    """
    pairs = sums.shape[1]
    sums = sums.double()
    norm = elements.double() if options.reduction == "mean" else torch.ones_like(sums[0])
    averaged = sums[:6] / norm
    winner_change, loser_change, winner_error = averaged[:3]
    beta = per_pair(options.beta, pairs, sums.device)
    weight = per_pair(options.pair_weight, pairs, sums.device)
    margin = beta / 2 * (loser_change - winner_change)
    loss_of_pair = -logsigmoid(margin)
    if options.winner_anchor:
        loss_of_pair = loss_of_pair + options.winner_anchor * winner_error
    loss = (weight * loss_of_pair).mean()
    push = weight / (pairs * norm)
    pull = push * beta / 2 * torch.sigmoid(-margin)
    slope = beta / 2 / norm
    scale = torch.ones_like(pull)
    if options.loser_scaling is not None:
        squares, product = sums[2], sums[6]
        bounded = ((1 - options.loser_scaling) * squares / product).clamp(0, 1)
        scale = torch.where(product > 0, bounded, scale)
    return Forward(
        loss.to(dtype),
        torch.cat([margin[None], averaged]).to(dtype),
        torch.stack([pull + options.winner_anchor * push, -pull * scale]),
        torch.stack([-slope, slope * scale]),
    )


def forward(tensors: PairTensors, noise: TargetNoise | None, mask: Mask | None, options: Options) -> Forward:
    """Compute the loss; see ``contract.Backend``."""
    first = tensors.policy_winner
    pairs = first.shape[0]
    dtype = arithmetic_dtype(*tensors, noise and noise.noise)
    targets = _Targets(noise, pairs, first.device, dtype)
    sums = [
        _pair_sums(tensors, targets, pair, None if mask is None else mask.counted[pair], dtype)
        for pair in range(pairs)
    ]
    elements = torch.full((pairs,), first[0].numel(), device=first.device) if mask is None else mask.counts
    return finish(torch.stack(sums, dim=1), elements, options, dtype)


def gradient(inputs: GradientInputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients; see ``contract.Backend``."""
    policy, target, noise, mask, coefficient, grad_loss, *_ = inputs
    pairs = policy[0].shape[0]
    dtype = arithmetic_dtype(*policy, *target, noise and noise.noise)
    targets = _Targets(noise, pairs, coefficient.device, dtype)
    factors = (2 * coefficient * grad_loss).to(dtype)
    grads = inputs.places()
    for member, grad in enumerate(grads):
        if grad is None:
            continue
        for pair in range(pairs):
            step = policy[member][pair].to(dtype) - targets.sample(target[member], pair)
            step = step.mul_(factors[member, pair])
            grad[pair] = step if mask is None else step.masked_fill_(~mask[pair], 0)
    return grads
