"""The paired loss for models whose memory holds the graph of one forward pass, but not of two.

The joint gradient is coefficient * d(winner's error - loser's error). It needs both errors before either backward
pass, but never both graphs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vpo_kernels.paired_dpo.checks import Given
from vpo_kernels.paired_dpo.contract import PairedDPOLoss
from vpo_kernels.paired_dpo.op import paired_dpo_loss

Predict = Callable[[], Tensor]
"""A function that runs the policy's forward pass on the winners, or the losers, and returns the prediction [P, ...]."""


def sequential_backward(
    winner: Predict,
    loser: Predict,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    *,
    scale: float = 1.0,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    **options: Any,
) -> PairedDPOLoss:
    """Add ``scale`` times the gradient of ``paired_dpo_loss`` to the policy, with one graph at a time.

    Three forward passes take the place of two: the winner's without a graph, the loser's with its backward pass, and
    the winner's again with its backward pass. The gradient equals the joint one if ``winner`` returns the same bits
    twice, so switch dropout off. At most the activations of one forward pass exist at a time.

    winner, loser: see ``Predict``. The other tensors, [P, ...], and ``options`` are those of ``paired_dpo_loss``.
    scale: multiplies the gradient only, as for accumulation over several batches.
    backward: is called twice with a scalar, the loser's first; ``accelerator.backward``, ``engine.backward``, or one
        that keeps gradients from being averaged over processes before the second call.

    Return what ``paired_dpo_loss`` does, without a graph. Raise ValueError as it does.
    """
    _refuse_margin_graph(options)
    constants = (reference_winner, reference_loser, target_winner, target_loser)
    with torch.no_grad():
        prediction_w = winner()
    prediction_l = loser()
    out = paired_dpo_loss(prediction_w, prediction_l, *constants, **options)
    backward(out.loss * scale)
    prediction_l = prediction_l.detach()
    again = paired_dpo_loss(winner(), prediction_l, *constants, **options)
    backward(again.loss * scale)
    return PairedDPOLoss(*(value.detach() for value in out))


def single_pair_backward(
    parameters: Iterable[Tensor],
    winner: Predict,
    loser: Predict,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    *,
    beta: Given = 500.0,
    winner_anchor: float = 0.0,
    scale: float = 1.0,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    **options: Any,
) -> PairedDPOLoss:
    """Do what ``sequential_backward`` does with two forward passes, for one pair per process and step.

    The winner's backward pass runs before its coefficient is known, with that of margin 0 in its place. Once the
    loser's forward pass has told the true one, the gradients are multiplied by the ratio, and the loser's backward pass
    adds its own. In exact arithmetic that is the joint gradient; in the gradients' dtype it differs by rounding.

    parameters: all tensors that the policy's backward pass gives gradients to. They must have none yet, because the
        multiplication would reach those too. Nothing may consume them in between: no optimizer in the backward pass,
        and no averaging over processes before the second ``backward``.

    The tensors are [1, ...]; the other arguments and the result are as for ``sequential_backward``. Raise ValueError
    for more than one pair, or for gradients left over.
    """
    _refuse_margin_graph(options)
    parameters = list(parameters)
    targets = (target_winner, target_loser)
    options |= {"beta": beta, "winner_anchor": winner_anchor}
    if reference_winner.ndim == 0 or reference_winner.shape[0] != 1:
        raise ValueError(
            f"reference_winner has shape {list(reference_winner.shape)}, but must be [1, ...]: pairs differ in their "
            "coefficients; use sequential_backward for several"
        )
    if any(parameter.grad is not None for parameter in parameters):
        raise ValueError(
            "a parameter has a gradient already, which would be scaled too; call optimizer.zero_grad() first, "
            "or use sequential_backward to accumulate"
        )
    prediction_w = winner()
    known = prediction_w.detach().requires_grad_()
    equal = paired_dpo_loss(known, reference_loser, known.detach(), reference_loser, *targets, **options)
    (direction,) = torch.autograd.grad(equal.loss, known)
    backward((prediction_w * direction).sum())
    del prediction_w
    out = paired_dpo_loss(known.detach(), loser(), reference_winner, reference_loser, *targets, **options)
    half = (beta if isinstance(beta, Tensor) else float(beta)) / 2
    pull = half * torch.sigmoid(
        -out.margin[0]
    )  # d loss / d winner's error is this plus the anchor; at margin 0 the
    factor = (pull + winner_anchor) / (half / 2 + winner_anchor) * scale  # sigmoid is a half
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype).reshape(()))
    backward(out.loss * scale)
    return PairedDPOLoss(*(value.detach() for value in out))


def _refuse_margin_graph(options: dict[str, Any]) -> None:
    if options.get("margin_graph"):
        raise ValueError(
            "margin_graph=True must be left out here: the backward passes, of the sigmoid loss, are made inside, and "
            "results have no graph; for a loss of your own run winner and loser jointly through paired_dpo_loss"
        )
