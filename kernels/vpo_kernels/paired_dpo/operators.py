"""The two operators of torch.library that the paired loss is made of, and their gradients.

``torch.ops.vpo_kernels.paired_dpo`` computes all results and the coefficients of their gradients,
``torch.ops.vpo_kernels.paired_dpo_gradient`` the gradient. Both are opaque to torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpo_kernels.backends import choose_backend
from vpo_kernels.paired_dpo import checks
from vpo_kernels.paired_dpo.contract import (
    PER_PAIR,
    GradientInputs,
    Options,
    PairTensors,
    PerPair,
    TargetNoise,
    WinnerLoser,
)
from vpo_kernels.registration import arithmetic_dtype, operator, refuse_second_derivative

# The operators take "winners and losers" as a list: of two tensors [P, ...], or of one tensor [2P, ...], a batch that
# holds the winners first.


def _halves(tensors: Sequence[Tensor]) -> WinnerLoser:
    """Return the winners and the losers of either list."""
    winner, loser = tensors[0].chunk(2) if len(tensors) == 1 else tensors
    return winner, loser


def _pair_tensors(tensors: Sequence[Tensor]) -> PairTensors:
    """Return the six tensors of winners and losers of policy, reference and target, which follow one another."""
    if len(tensors) == 6:
        return PairTensors(*tensors)
    each = len(tensors) // 3
    parts = (_halves(tensors[start : start + each]) for start in range(0, 3 * each, each))
    return PairTensors(*(tensor for part in parts for tensor in part))


def _join(number: float, each: Tensor | None) -> PerPair:
    return number if each is None else each


def split(value: PerPair) -> tuple[float, Tensor | None]:
    """Return a value per pair as the operators take it: a number, or a tensor in its place."""
    return (1.0, value) if isinstance(value, Tensor) else (value, None)


def is_observed(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether more than the backend's own work depends on a call of an operator of torch.library.

    Where all tensors are plain ones on the CPU, and no mode, function transform or profiler looks at operators, the
    function behind the operator does the same, without the 20 microseconds that torch.library takes.
    """
    others = [each for each in tensors if each is not None and (type(each) not in _PLAIN or not each.is_cpu)]
    return bool(others) or _modes() > 0 or _transforms() or _profiler()


_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_profiler = torch.autograd._profiler_enabled
_PLAIN = (Tensor, torch.nn.Parameter)


def run_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of ``contract.Forward``.

    tensors: winners and losers of the policy, then of the reference, then of the target: six, or three batches.
    """
    found = _pair_tensors(tensors)
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
    loss, per_pair, coefficient, slope = chosen.forward(found, formed, counted, options)
    return loss, per_pair, coefficient, slope


paired_dpo = operator("paired_dpo")(run_forward)


@torch.library.register_fake("vpo_kernels::paired_dpo")
def _(tensors: Sequence[Tensor], noise: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    like, dtype = tensors[0], arithmetic_dtype(*tensors, noise)
    pairs = like.shape[0] // (6 // len(tensors))
    coefficients = (like.new_empty((2, pairs), dtype=torch.float64) for _ in range(2))
    return like.new_empty((), dtype=dtype), like.new_empty((PER_PAIR, pairs), dtype=dtype), *coefficients


def _run_gradient(
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
    """Return the gradients of both policy predictions; an empty tensor in place of one that is not wanted.

    policy, target: winners and losers. If the policy's are a batch, return its gradient and an empty tensor.
    """
    members, batch = _halves(policy), torch.empty_like(policy[0]) if len(policy) == 1 else None
    scales = _join(x0_scale, x0_scale_each), _join(noise_scale, noise_scale_each)
    inputs = GradientInputs(
        members,
        _halves(target),
        None if noise is None else TargetNoise(noise, *scales),
        None if mask is None else mask.expand(members[0].shape),
        coefficient,
        grad_loss,
        (want_winner, want_loser),
        None if batch is None else _halves([batch]),
    )
    winner, loser = choose_backend("paired_dpo", backend, members[0].device).gradient(inputs)
    if batch is not None:
        return batch, batch.new_empty(0)
    return (
        members[0].new_empty(0) if winner is None else winner,
        members[1].new_empty(0) if loser is None else loser,
    )


_gradient = operator("paired_dpo_gradient")(_run_gradient)


@torch.library.register_fake("vpo_kernels::paired_dpo_gradient")
def _(policy: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    wanted = rest[-3:-1] if len(policy) == 2 else (True, False)
    return tuple(
        torch.empty_like(each) if want else each.new_empty(0)
        for each, want in zip((policy[0], policy[-1]), wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the policy predictions, what makes the targets, and the output from the coefficients on.

    These are two numbers per pair, and two more if the slopes are among them. There are no elementwise temporaries.
    """
    tensors, noise, mask, x0_scale, x0_scale_each, noise_scale, noise_scale_each, *_, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.scales, ctx.backend, each = (x0_scale, noise_scale), backend, len(tensors) // 3
    ctx.save_for_backward(
        *tensors[:each], *tensors[2 * each :], noise, mask, x0_scale_each, noise_scale_each, *output[2:]
    )


def _weighted(
    grad_loss: Tensor | None, grad_margin: Tensor | None, coefficient: Tensor, slope: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return coefficients [2, P] and a scalar that multiplies them, of the gradient of loss and margin together.

    Return None if neither of them has a gradient.
    """
    if grad_margin is None:
        return None if grad_loss is None else (coefficient, grad_loss)
    assert slope is not None, "a margin without slopes has no graph"
    total = slope * grad_margin
    if grad_loss is not None:
        total = total + coefficient * grad_loss
    return total, grad_margin.new_ones(())


def _policy_gradients(
    ctx: Any, grad_loss: Tensor | None, grad_margin: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the policy's predictions: of two tensors or of one batch, None where none is wanted."""
    each, saved = len(wanted), ctx.saved_tensors
    noise, mask, x0_scale_each, noise_scale_each, *coefficients = saved[2 * each :]
    weighted = _weighted(grad_loss, grad_margin, *coefficients)
    if weighted is None or not any(wanted):
        return [None] * each
    x0_scale, noise_scale = ctx.scales
    inputs = (
        saved[:each],
        saved[each : 2 * each],
        noise,
        mask,
        x0_scale,
        x0_scale_each,
        noise_scale,
        noise_scale_each,
        *weighted,
        wanted[0],
        wanted[-1],
        ctx.backend,
    )
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        gradients = _gradient(*inputs)
    else:
        run = _gradient if is_observed((*saved, *weighted)) else _run_gradient
        with torch._C._AutoDispatchBelowAutograd():
            gradients = run(*inputs)
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=False)]


def _differentiate(
    ctx: Any, grad_loss: Tensor | None, grad_per_pair: Tensor | None, *_: Tensor | None
) -> tuple[object, ...]:
    """Return the gradients of the operator's inputs: of its list of tensors, and None for each of the other 14."""
    wanted = ctx.needs_input_grad[0]
    each = len(wanted) // 3
    grad_margin = None if grad_per_pair is None else grad_per_pair[0]
    policy = _policy_gradients(ctx, grad_loss, grad_margin, wanted[:each])
    return [*policy, *[None] * (2 * each)], *[None] * 14


class AttachGradient(torch.autograd.Function):
    """Gives a loss and a margin that are computed already their gradients.

    The operator has these gradients, too, but torch.library's way to them takes 0.2 ms a call.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], with_margin: bool, *policy: Tensor
    ) -> tuple[Tensor, ...]:
        _save(ctx, inputs, output if with_margin else output[:3])
        return (output[0], output[1][0].clone()) if with_margin else (output[0],)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_margin: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        return None, None, None, *_policy_gradients(ctx, grad_loss, grad_margin, ctx.needs_input_grad[3:])


torch.library.register_autograd("vpo_kernels::paired_dpo", _differentiate, setup_context=_save)
refuse_second_derivative(
    "paired_dpo_loss",
    "paired_dpo_gradient",
    "differentiate without create_graph=True, or write the loss out in torch "
    "(vpo_kernels/paired_dpo/reference.py has the formula)",
)
