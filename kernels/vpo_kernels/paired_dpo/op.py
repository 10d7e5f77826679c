"""``paired_dpo_loss``, and the two operators of torch.library that it is made of.

``torch.ops.vpo_kernels.paired_dpo`` computes loss, margin, gaps and the coefficients of the gradient,
``torch.ops.vpo_kernels.paired_dpo_gradient`` the gradient. Both are opaque to torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpo_kernels.paired_dpo import checks
from vpo_kernels.paired_dpo.backends import BackendName, check_name, choose_backend, load
from vpo_kernels.paired_dpo.contract import (
    Noise,
    Options,
    PairedDPOLoss,
    PerPair,
    Reduction,
    Sextet,
)
from vpo_kernels.registration import arithmetic_dtype, operator, refuse_second_derivative


def _noise(noise: Tensor | None, scales: tuple[PerPair, PerPair]) -> Noise | None:
    return None if noise is None else Noise(noise, *scales)


def _either(number: float, each: Tensor | None) -> PerPair:
    return number if each is None else each


@operator("paired_dpo")
def _paired_dpo(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    beta: float,
    beta_each: Tensor | None,
    pair_weight: float,
    pair_weight_each: Tensor | None,
    x0_scale: float,
    x0_scale_each: Tensor | None,
    noise_scale: float,
    noise_scale_each: Tensor | None,
    reduction: str,
    winner_anchor: float,
    loser_scaling: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, margin, winner_gap, loser_gap, and the coefficients [2, P] of ``contract.Forward``."""
    tensors = Sextet(
        policy_winner, policy_loser, reference_winner, reference_loser, target_winner, target_loser
    )
    scales = _either(x0_scale, x0_scale_each), _either(noise_scale, noise_scale_each)
    options = Options(
        _either(beta, beta_each),
        _either(pair_weight, pair_weight_each),
        "sum" if reduction == "sum" else "mean",
        winner_anchor,
        loser_scaling,
    )
    expanded = None if mask is None else checks.expand_mask(mask, policy_winner.shape)
    chosen = load(choose_backend(backend, policy_winner.device))
    out, coefficient = chosen.forward(tensors, _noise(noise, scales), expanded, options)
    return *out, coefficient


@torch.library.register_fake("vpo_kernels::paired_dpo")
def _(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    noise: Tensor | None,
    *_: object,
) -> tuple[Tensor, ...]:
    pairs = policy_winner.shape[0]
    dtype = arithmetic_dtype(
        policy_winner, policy_loser, reference_winner, reference_loser, target_winner, target_loser, noise
    )
    loss = policy_winner.new_empty((), dtype=dtype)
    margin, winner_gap, loser_gap = (policy_winner.new_empty(pairs, dtype=dtype) for _ in range(3))
    return loss, margin, winner_gap, loser_gap, policy_winner.new_empty((2, pairs), dtype=torch.float64)


@operator("paired_dpo_gradient")
def _gradient(
    policy_winner: Tensor,
    policy_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
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
    """Gradients of both policy predictions; an empty tensor in place of one that is not wanted."""
    scales = _either(x0_scale, x0_scale_each), _either(noise_scale, noise_scale_each)
    winner, loser = load(choose_backend(backend, policy_winner.device)).gradient(
        (policy_winner, policy_loser),
        (target_winner, target_loser),
        _noise(noise, scales),
        None if mask is None else mask.expand(policy_winner.shape),
        coefficient,
        grad_loss,
        (want_winner, want_loser),
    )
    empty = policy_winner.new_empty
    return empty(0) if winner is None else winner, empty(0) if loser is None else loser


@torch.library.register_fake("vpo_kernels::paired_dpo_gradient")
def _(policy_winner: Tensor, policy_loser: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    want_winner, want_loser = rest[-3:-1]
    empty = policy_winner.new_empty
    return (
        torch.empty_like(policy_winner) if want_winner else empty(0),
        torch.empty_like(policy_loser) if want_loser else empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The policy predictions, what makes the targets, and two numbers per pair; no elementwise temporaries."""
    policy_winner, policy_loser, _, _, target_winner, target_loser, noise, mask, *numbers, backend = inputs
    ctx.numbers, ctx.backend = (numbers[4], numbers[6]), backend
    scales_each = numbers[5], numbers[7]
    ctx.save_for_backward(
        policy_winner, policy_loser, target_winner, target_loser, noise, mask, *scales_each, output[4]
    )


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, x0_scale_each, noise_scale_each, coefficient = ctx.saved_tensors
    want_winner, want_loser = ctx.needs_input_grad[:2]
    inputs = (
        *tensors,
        ctx.numbers[0],
        x0_scale_each,
        ctx.numbers[1],
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
    return winner if want_winner else None, loser if want_loser else None, *[None] * 18


class _Attach(torch.autograd.Function):
    """Gives a loss that is known its gradient.

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
        return _differentiate(ctx, grad_loss)[:4]


def _compute(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What the operator returns, with a graph from the loss to the policy predictions if one is wanted."""
    if torch.compiler.is_compiling():
        return _paired_dpo(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        output = _paired_dpo(*inputs)
    policy = inputs[:2]
    if torch.is_grad_enabled() and (policy[0].requires_grad or policy[1].requires_grad):
        return _Attach.apply(*policy, inputs, output), *output[1:]
    return output


torch.library.register_autograd("vpo_kernels::paired_dpo", _differentiate, setup_context=_save)
refuse_second_derivative(
    "paired_dpo_loss",
    "paired_dpo_gradient",
    "differentiate without create_graph=True, or write the loss out in torch "
    "(vpo_kernels/paired_dpo/reference.py has the formula)",
)


def _split(value: PerPair) -> tuple[float, Tensor | None]:
    """As the operators take it: a number, or a tensor in its place."""
    return (1.0, value) if isinstance(value, Tensor) else (value, None)


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
    """The Diffusion-DPO loss of P winner and loser pairs.

    The six tensors are [P, ...], of one shape and on one device, of any float dtypes and strides: what the
    policy and the frozen reference predict for the noised winner and loser, and what they should have
    predicted. Results are float32, float64 when an input is float64. Gradients reach the two policy
    predictions only, through ``loss``, in their own dtypes; ``margin`` and the gaps carry no graph, and
    everything else is constant. Repeatable bit for bit; a pair's margin and gaps do not depend on the rest
    of the batch. NaN in, NaN out. A second derivative raises RuntimeError.

    beta: strength of the pull towards the reference. It multiplies half the difference of the gaps, so it has
        another size under ``reduction="sum"``: beta_sum = beta_mean / n for n elements per sample. A tensor
        [P] weights pairs inside the sigmoid, as by their time (``error_weight``); its values are not checked.
    reduction: a sample's error is the mean over its counted elements, or their sum.
    pair_weight: [P], multiplies each pair's loss outside the sigmoid. Not normalised: the mean is over P.
    mask: bool, broadcastable to [P, ...], True counts; winner and loser share it. What it hides may be NaN.
    backend: ``reference`` (torch), ``native`` (CPU), ``triton`` (CUDA, ROCm), or ``auto``, the fastest that
        runs where the tensors are; ``available_backends`` says which do, and why the others do not.
    target_noise: [P, ...], the noise that the pair shares. With it, target_winner and target_loser are the
        clean latents x0, and the target a * x0 + b * noise is formed inside.
    target_scales: (a, b), numbers or tensors [P]: (1, -1) for Open-Sora's velocity, (-1, 1) for the velocity
        towards the noise, (-sigma_t, alpha_t) for v, (0, 1) for epsilon. Goes with target_noise.
    winner_anchor: adds this times error(policy, winner) to each pair's loss, against winners that get worse
        while the margin grows.
    loser_scaling: mu of Diffusion-SDPO (arXiv 2511.03317), 0 to 1: scales the loser's gradient, and only
        that, down to where the winner's error does not grow to first order; ``reference.py`` has the rule.

    Raises ValueError, naming argument, value, constraint and remedy, for whatever does not fit: differing
    shapes or devices, an empty batch, a beta that is not finite and positive, a pair that the mask hides
    altogether, a backend that does not run here.
    """
    named = [
        ("policy_winner", policy_winner),
        ("policy_loser", policy_loser),
        ("reference_winner", reference_winner),
        ("reference_loser", reference_loser),
        ("target_winner", target_winner),
        ("target_loser", target_loser),
    ]
    if (target_noise is None) != (target_scales is None):
        given, missing = (
            ("target_noise", "target_scales") if target_scales is None else ("target_scales", "target_noise")
        )
        raise ValueError(f"{given} is given without {missing}; a target formed inside needs both")
    checks.check_tensors([*named, *([] if target_noise is None else [("target_noise", target_noise)])])
    checks.check_options(reduction, winner_anchor, loser_scaling)
    check_name(backend)
    a, b = target_scales or (1.0, 1.0)
    weight: PerPair = 1.0 if pair_weight is None else pair_weight
    if pair_weight is not None and not isinstance(pair_weight, Tensor):
        raise ValueError(f"pair_weight is {pair_weight!r}, but must be a tensor [P], one weight per pair")
    inputs = (
        policy_winner,
        policy_loser,
        reference_winner.detach(),
        reference_loser.detach(),
        target_winner.detach(),
        target_loser.detach(),
        None if target_noise is None else target_noise.detach(),
        checks.check_mask(mask, policy_winner),
        *_split(checks.check_beta(beta, policy_winner)),
        *_split(checks.check_per_pair("pair_weight", weight, policy_winner)),
        *_split(checks.check_per_pair("target_scales[0]", a, policy_winner)),
        *_split(checks.check_per_pair("target_scales[1]", b, policy_winner)),
        reduction,
        float(winner_anchor),
        None if loser_scaling is None else float(loser_scaling),
        backend,
    )
    return PairedDPOLoss(*_compute(inputs)[:4])
