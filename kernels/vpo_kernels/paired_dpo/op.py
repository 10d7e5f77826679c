"""``paired_dpo_loss`` and ``batched_paired_dpo_loss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpo_kernels.backends import BackendName, check_name
from vpo_kernels.paired_dpo import checks
from vpo_kernels.paired_dpo.contract import Options, PairedDPOLoss, PairTensors, Reduction, TargetNoise
from vpo_kernels.paired_dpo.operators import AttachGradient, is_observed, paired_dpo, run_forward, split


def _compute(tensors: Sequence[Tensor], inputs: tuple[Any, ...], margin_graph: bool) -> PairedDPOLoss:
    """Run the operator, with a graph from loss, and margin if asked for, to the policy predictions if one is wanted."""
    policy = tensors[: len(tensors) // 3]
    if torch.compiler.is_compiling():
        loss, per_pair, *_ = paired_dpo(list(tensors), *inputs)
        margin, *others = (per_pair if margin_graph else per_pair.detach()).unbind()
        return PairedDPOLoss(loss, margin, *(other.detach() for other in others))
    noise, mask, _, x0_scale, _, noise_scale, _, beta, _, pair_weight, *_ = inputs
    observed = is_observed((*tensors, noise, mask, x0_scale, noise_scale, beta, pair_weight))
    run = paired_dpo if observed else run_forward
    with torch._C._AutoDispatchBelowAutograd():
        output = run(tensors, *inputs)
    loss, per_pair, *_ = output
    margin, *others = per_pair.unbind()
    if torch.is_grad_enabled() and (policy[0].requires_grad or policy[-1].requires_grad):
        graphed = AttachGradient.apply((tensors, *inputs), output, margin_graph, *policy)
        loss, margin = (*graphed, margin)[:2]  # the margin comes back with a graph only if it was asked for
    return PairedDPOLoss(loss, margin, *others)


def _operator_inputs(
    noise: TargetNoise | None, mask: Tensor | None, options: Options, backend: str
) -> tuple[Any, ...]:
    """Return the operator's inputs after its tensors."""
    x0_scale, noise_scale = (1.0, 1.0) if noise is None else (noise.x0_scale, noise.noise_scale)
    return (
        None if noise is None else noise.noise,
        mask,
        *split(x0_scale),
        *split(noise_scale),
        *split(options.beta),
        *split(options.pair_weight),
        options.reduction,
        options.winner_anchor,
        options.loser_scaling,
        backend,
    )


def paired_dpo_loss(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    beta: checks.Given = 500.0,
    reduction: Reduction = "mean",
    pair_weight: checks.Given | None = None,
    mask: Tensor | None = None,
    backend: BackendName = "auto",
    *,
    target_noise: Tensor | None = None,
    target_scales: tuple[checks.Given, checks.Given] | None = None,
    winner_anchor: float = 0.0,
    loser_scaling: float | None = None,
    margin_graph: bool = False,
) -> PairedDPOLoss:
    """Compute the Diffusion-DPO loss (arXiv 2311.12908) of P pairs of a winner and a loser.

    The six tensors are [P, ...], of one shape, on one device, of any float dtypes and strides: what the policy and the
    frozen reference predict for the noised winner and loser, and what they should have predicted. Results are float32,
    float64 when an input is float64, and repeat bit for bit; those of a pair do not depend on the rest of the batch.
    Gradients reach the two policy predictions only, in their own dtypes. NaN in, NaN out. A second derivative raises
    RuntimeError.

    beta: multiplies half the difference of the error changes. So beta_sum = beta_mean / n for n elements per sample;
        docs/loss.md has what the betas of other trainers become. A beta per pair weights pairs inside the sigmoid.
    reduction: a sample's error is the mean over its counted elements, or their sum.
    pair_weight: multiplies each pair's loss outside the sigmoid. It is not normalised: the mean is over P.
    mask: bool, broadcastable to [P, ...], True counts; winner and loser share it. What it hides may be NaN.
    backend: ``reference`` (torch), ``native`` (CPU), ``triton`` (CUDA, ROCm), or ``auto``, the fastest that runs where
        the tensors are; ``available_backends`` says which do, and why the others do not.
    target_noise: [P, ...], the noise that the pair shares. With it, target_winner and target_loser are the clean
        latents x0, and the target a * x0 + b * noise is formed inside.
    target_scales: (a, b): (1, -1) for Open-Sora's velocity, (-1, 1) for the velocity towards the noise,
        (-sigma_t, alpha_t) for v, (0, 1) for epsilon. It goes with target_noise.
    winner_anchor: adds this times error(policy, winner) to each pair's loss.
    loser_scaling: mu of Diffusion-SDPO (arXiv 2511.03317), 0 to 1: scales the loser's gradient, and only that, down to
        where the winner's error does not grow to first order; ``reference.py`` has the rule.
    margin_graph: whether gradients flow through ``margin``, too: a hinge loss is ``torch.relu(1 - out.margin).mean()``.

    beta, pair_weight and each of target_scales are a number of Python or numpy for all pairs, or a floating point
    tensor of shape [P], or of shape [] or [1] for all pairs. Values of tensors are not checked, because the host would
    wait for the device.

    Raise ValueError, naming argument, value, constraint and remedy, for whatever does not fit.
    """
    given = policy_winner, policy_loser, reference_winner, reference_loser, target_winner, target_loser
    tensors = checks.check_tensors(dict(zip(PairTensors._fields, given, strict=True)))
    like = checks.Like("policy_winner", policy_winner.shape, policy_winner.device)
    noise = checks.check_noise(target_noise, target_scales, like)
    options = checks.check_options(like, beta, pair_weight, reduction, winner_anchor, loser_scaling)
    check_name(backend)
    inputs = _operator_inputs(noise, checks.check_mask(mask, like), options, backend)
    return _compute(tensors, inputs, margin_graph)


def batched_paired_dpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    beta: checks.Given = 500.0,
    reduction: Reduction = "mean",
    pair_weight: checks.Given | None = None,
    mask: Tensor | None = None,
    backend: BackendName = "auto",
    *,
    target_noise: Tensor | None = None,
    target_scales: tuple[checks.Given, checks.Given] | None = None,
    winner_anchor: float = 0.0,
    loser_scaling: float | None = None,
    margin_graph: bool = False,
) -> PairedDPOLoss:
    """Compute ``paired_dpo_loss`` of batches as public trainers hold them.

    policy, reference, target: [2P, ...], P winners and then their P losers in the same order, as ``chunk(2)`` takes
        them apart. Results and gradients are those of ``paired_dpo_loss`` of the halves, bit for bit; the policy's
        gradient is written into one tensor [2P, ...], which autograd would otherwise put together from two.

    The other arguments are those of ``paired_dpo_loss``: numbers per pair are [P], target_noise is [P, ...], and mask
    is broadcastable to [P, ...]. Raise ValueError as it does, and for a batch that has no two halves.
    """
    tensors = checks.check_tensors({"policy": policy, "reference": reference, "target": target})
    like = checks.check_batch(policy)
    noise = checks.check_noise(target_noise, target_scales, like)
    options = checks.check_options(like, beta, pair_weight, reduction, winner_anchor, loser_scaling)
    check_name(backend)
    inputs = _operator_inputs(noise, checks.check_mask(mask, like), options, backend)
    return _compute(tensors, inputs, margin_graph)
