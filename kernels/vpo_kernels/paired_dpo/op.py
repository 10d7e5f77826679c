"""``paired_dpo_loss``, and the two operators of torch.library that it is made of.

``torch.ops.vpo_kernels.paired_dpo`` computes loss, margin, error changes and the coefficients of the gradient,
``torch.ops.vpo_kernels.paired_dpo_gradient`` the gradient. Both are opaque to torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpo_kernels.backends import BackendName, check_name, choose_backend
from vpo_kernels.paired_dpo import checks
from vpo_kernels.paired_dpo.contract import (
    GradientInputs,
    Options,
    PairedDPOLoss,
    PairTensors,
    PerPair,
    Reduction,
    TargetNoise,
)
from vpo_kernels.registration import arithmetic_dtype, operator, refuse_second_derivative


def _join(number: float, each: Tensor | None) -> PerPair:
    return number if each is None else each


def _split(value: PerPair) -> tuple[float, Tensor | None]:
    """Return a value per pair as the operators take it: a number, or a tensor in its place."""
    return (1.0, value) if isinstance(value, Tensor) else (value, None)


@operator("paired_dpo")
def _paired_dpo(
    tensors: Sequence[Tensor],
    noise: Tensor | None,
    mask: Tensor | None,
    x0_scale: float,
    x0_scale_each: Tensor | None,
    noise_scale: float,
    noise_scale_each: Tensor | None,
    beta: float,
    beta_each: Tensor | None,
    pair_weight: float,
    pair_weight_each: Tensor | None,
    reduction: str,
    winner_anchor: float,
    loser_scaling: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the four tensors of ``PairedDPOLoss``, and the coefficients [2, P] of ``contract.Forward``.

    tensors: those of ``PairTensors``, in its order.
    """
    found = PairTensors(*tensors)
    scales = _join(x0_scale, x0_scale_each), _join(noise_scale, noise_scale_each)
    options = Options(
        _join(beta, beta_each),
        _join(pair_weight, pair_weight_each),
        "sum" if reduction == "sum" else "mean",
        winner_anchor,
        loser_scaling,
    )
    counted = None if mask is None else checks.expand_mask(mask, found.policy_winner.shape)
    formed = None if noise is None else TargetNoise(noise, *scales)
    chosen = choose_backend("paired_dpo", backend, found.policy_winner.device)
    out, coefficient = chosen.forward(found, formed, counted, options)
    return *out, coefficient


@torch.library.register_fake("vpo_kernels::paired_dpo")
def _(tensors: Sequence[Tensor], noise: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    like, dtype = tensors[0], arithmetic_dtype(*tensors, noise)
    pairs = like.shape[0]
    per_pair = (like.new_empty(pairs, dtype=dtype) for _ in range(3))
    return like.new_empty((), dtype=dtype), *per_pair, like.new_empty((2, pairs), dtype=torch.float64)


@operator("paired_dpo_gradient")
def _gradient(
    policy: Sequence[Tensor],
    target: Sequence[Tensor],
    noise: Tensor | None,
    mask: Tensor | None,
    x0_scale: float,
    x0_scale_each: Tensor | None,
    noise_scale: float,
    noise_scale_each: Tensor | None,
    coefficient: Tensor,
    grad_loss: Tensor,
    want_winner: bool,
    want_loser: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both policy predictions; an empty tensor in place of one that is not wanted."""
    scales = _join(x0_scale, x0_scale_each), _join(noise_scale, noise_scale_each)
    inputs = GradientInputs(
        (policy[0], policy[1]),
        (target[0], target[1]),
        None if noise is None else TargetNoise(noise, *scales),
        None if mask is None else mask.expand(policy[0].shape),
        coefficient,
        grad_loss,
        (want_winner, want_loser),
    )
    winner, loser = choose_backend("paired_dpo", backend, policy[0].device).gradient(inputs)
    empty = policy[0].new_empty
    return empty(0) if winner is None else winner, empty(0) if loser is None else loser


@torch.library.register_fake("vpo_kernels::paired_dpo_gradient")
def _(policy: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    wanted = rest[-3:-1]
    return tuple(
        torch.empty_like(each) if want else each.new_empty(0)
        for each, want in zip(policy, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the policy predictions, what makes the targets, and two numbers per pair; no elementwise temporaries."""
    tensors, noise, mask, x0_scale, x0_scale_each, noise_scale, noise_scale_each, *_, backend = inputs
    tensors = PairTensors(*tensors)
    ctx.scales, ctx.backend = (x0_scale, noise_scale), backend
    ctx.save_for_backward(
        *tensors.policy, *tensors.target, noise, mask, x0_scale_each, noise_scale_each, output[4]
    )


def _policy_gradients(
    ctx: Any, grad_loss: Tensor, want_winner: bool, want_loser: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the two policy predictions, None where none is wanted."""
    *tensors, noise, mask, x0_scale_each, noise_scale_each, coefficient = ctx.saved_tensors
    x0_scale, noise_scale = ctx.scales
    inputs = (
        tensors[:2],
        tensors[2:],
        noise,
        mask,
        x0_scale,
        x0_scale_each,
        noise_scale,
        noise_scale_each,
        coefficient,
        grad_loss,
        want_winner,
        want_loser,
        ctx.backend,
    )
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        winner, loser = _gradient(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            winner, loser = _gradient(*inputs)
    return winner if want_winner else None, loser if want_loser else None


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[object, ...]:
    """Return the gradients of the operator's inputs: of its list of tensors, and None for each of the other 14."""
    policy = _policy_gradients(ctx, grad_loss, *ctx.needs_input_grad[0][:2])
    return [*policy, None, None, None, None], *[None] * 14


class _AttachGradient(torch.autograd.Function):
    """Gives a loss that is computed already its gradient.

    The operator has that gradient, too, but torch.library's way to it takes 0.2 ms a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy_winner: Tensor,
        policy_loser: Tensor,
        inputs: tuple[Any, ...],
        output: tuple[Tensor, ...],
    ) -> Tensor:
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *_policy_gradients(ctx, grad_loss, *ctx.needs_input_grad[:2]), None, None


def _compute(tensors: PairTensors, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run the operator, with a graph from the loss to the policy predictions if one is wanted."""
    if torch.compiler.is_compiling():
        return _paired_dpo(list(tensors), *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        output = _paired_dpo(tensors, *inputs)
    if torch.is_grad_enabled() and any(policy.requires_grad for policy in tensors.policy):
        return _AttachGradient.apply(*tensors.policy, (tensors, *inputs), output), *output[1:]
    return output


torch.library.register_autograd("vpo_kernels::paired_dpo", _differentiate, setup_context=_save)
refuse_second_derivative(
    "paired_dpo_loss",
    "paired_dpo_gradient",
    "differentiate without create_graph=True, or write the loss out in torch "
    "(vpo_kernels/paired_dpo/reference.py has the formula)",
)


def _operator_inputs(
    noise: TargetNoise | None, mask: Tensor | None, options: Options, backend: str
) -> tuple[Any, ...]:
    """Return the operator's inputs after its tensors."""
    formed = noise or (None, 1.0, 1.0)
    per_pair = (*formed[1:], options.beta, options.pair_weight)
    return formed[0], mask, *(part for value in per_pair for part in _split(value)), *options[2:], backend


def paired_dpo_loss(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    beta: PerPair = 500.0,
    reduction: Reduction = "mean",
    pair_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: BackendName = "auto",
    *,
    target_noise: Tensor | None = None,
    target_scales: tuple[PerPair, PerPair] | None = None,
    winner_anchor: float = 0.0,
    loser_scaling: float | None = None,
) -> PairedDPOLoss:
    """Compute the Diffusion-DPO loss (arXiv 2311.12908) of P pairs of a winner and a loser.

    The six tensors are [P, ...], of one shape, on one device, of any float dtypes and strides: what the policy and the
    frozen reference predict for the noised winner and loser, and what they should have predicted. Results are float32,
    float64 when an input is float64, and repeat bit for bit; those of a pair do not depend on the rest of the batch.
    Gradients reach the two policy predictions only, through ``loss``, in their own dtypes; everything else is constant.
    NaN in, NaN out. A second derivative raises RuntimeError.

    beta: strength of the pull towards the reference. It multiplies half the difference of the error changes, so it has
        another size under ``reduction="sum"``: beta_sum = beta_mean / n for n elements per sample. A tensor [P] weights
        pairs inside the sigmoid, as by their time (``error_weight``); its values are not checked.
    reduction: a sample's error is the mean over its counted elements, or their sum.
    pair_weight: [P], multiplies each pair's loss outside the sigmoid. It is not normalised: the mean is over P.
    mask: bool, broadcastable to [P, ...], True counts; winner and loser share it. What it hides may be NaN.
    backend: ``reference`` (torch), ``native`` (CPU), ``triton`` (CUDA, ROCm), or ``auto``, the fastest that runs where
        the tensors are; ``available_backends`` says which do, and why the others do not.
    target_noise: [P, ...], the noise that the pair shares. With it, target_winner and target_loser are the clean
        latents x0, and the target a * x0 + b * noise is formed inside.
    target_scales: (a, b), numbers or tensors [P]: (1, -1) for Open-Sora's velocity, (-1, 1) for the velocity towards
        the noise, (-sigma_t, alpha_t) for v, (0, 1) for epsilon. It goes with target_noise.
    winner_anchor: adds this times error(policy, winner) to each pair's loss, against winners that get worse while the
        margin grows.
    loser_scaling: mu of Diffusion-SDPO (arXiv 2511.03317), 0 to 1: scales the loser's gradient, and only that, down to
        where the winner's error does not grow to first order; ``reference.py`` has the rule.

    Raise ValueError, naming argument, value, constraint and remedy, for whatever does not fit: differing shapes or
    devices, an empty batch, a beta that is not finite and positive, a pair that the mask hides altogether, a backend
    that does not run here.
    """
    tensors = PairTensors(
        policy_winner, policy_loser, reference_winner, reference_loser, target_winner, target_loser
    )
    tensors = checks.check_tensors(tensors, target_noise)
    noise = checks.check_noise(target_noise, target_scales, policy_winner)
    options = checks.check_options(policy_winner, beta, pair_weight, reduction, winner_anchor, loser_scaling)
    check_name(backend)
    inputs = _operator_inputs(noise, checks.check_mask(mask, policy_winner), options, backend)
    return PairedDPOLoss(*_compute(tensors, inputs)[:4])
