"""The values that pass between the paired loss, its backends and its users.

There are P pairs. A prediction is [P, ...] with n elements per sample, of which a mask may leave fewer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]
PerPair = float | Tensor
"""A number for all pairs, or a tensor [P] of any float dtype."""
WinnerLoser = tuple[Tensor, Tensor]
"""A tensor [P, ...] of the winners, and one of the losers."""


class PairedDPOLoss(NamedTuple):
    """The loss and what it is made of: float32, or float64 when an input was float64.

    Gradients flow through ``loss``, and through ``margin`` where ``margin_graph`` asked for it; the rest is for logs.
    An error is the mean, or the sum, of the squared differences from the target, over the elements that count. An error
    change is the policy's error less the reference's: negative where the policy predicts better than the reference.
    """

    loss: Tensor  # scalar: mean over pairs of pair_weight * -logsigmoid(margin)
    margin: Tensor  # [P]: -(beta / 2) * (winner_error_change - loser_error_change)
    winner_error_change: Tensor  # [P]: error(policy, winner) - error(reference, winner), without cancellation
    loser_error_change: Tensor  # [P]: error(policy, loser) - error(reference, loser), without cancellation
    policy_winner_error: Tensor  # [P]
    policy_loser_error: Tensor  # [P]
    reference_winner_error: Tensor  # [P]
    reference_loser_error: Tensor  # [P]

    @property
    def winner_gap(self) -> Tensor:
        """Return ``winner_error_change`` under the name that it had in version 0.1."""
        return self.winner_error_change

    @property
    def loser_gap(self) -> Tensor:
        """Return ``loser_error_change`` under the name that it had in version 0.1."""
        return self.loser_error_change


PER_PAIR = len(PairedDPOLoss._fields) - 1
"""The results that are [P]: all but the loss."""


class PairTensors(NamedTuple):
    """The six tensors of the loss, each [P, ...], of one shape and on one device.

    With a ``TargetNoise`` beside them, the targets are clean latents.
    """

    policy_winner: Tensor
    policy_loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor
    target_winner: Tensor
    target_loser: Tensor

    @property
    def policy(self) -> WinnerLoser:
        return self.policy_winner, self.policy_loser

    @property
    def reference(self) -> WinnerLoser:
        return self.reference_winner, self.reference_loser

    @property
    def target(self) -> WinnerLoser:
        return self.target_winner, self.target_loser


class TargetNoise(NamedTuple):
    """The noise that makes x0_scale * x0 + noise_scale * noise of a clean latent x0, which is then the target."""

    noise: Tensor  # [P, ...], shared by winner and loser
    x0_scale: PerPair
    noise_scale: PerPair


class Mask(NamedTuple):
    """The elements that count, the same in winner and loser."""

    counted: Tensor  # bool, expanded to [P, ...]: strides may be 0
    counts: Tensor  # int64 [P]: its True elements per pair, at least one each


class Options(NamedTuple):
    """Numbers that shape the loss; ``paired_dpo_loss`` says what they mean."""

    beta: PerPair
    pair_weight: PerPair
    reduction: Reduction
    winner_anchor: float  # 0: none
    loser_scaling: float | None


class Forward(NamedTuple):
    """The result of a backend's forward pass."""

    loss: Tensor
    per_pair: Tensor
    """[PER_PAIR, P]: the other results, in the order of ``PairedDPOLoss``."""
    coefficient: Tensor
    """float64 [2, P]: d loss / d (squared error of the policy, summed over the sample's elements), of winner
    and loser; the loser's carries ``loser_scaling``'s factor."""
    slope: Tensor
    """float64 [2, P]: d margin / d the same, the loser's with the same factor."""

    @property
    def out(self) -> PairedDPOLoss:
        return PairedDPOLoss(self.loss, *self.per_pair.unbind())


class GradientInputs(NamedTuple):
    """The inputs of the gradient: the tensors that forward saved, and the gradient of the loss."""

    policy: WinnerLoser
    target: WinnerLoser
    noise: TargetNoise | None
    mask: Tensor | None  # bool, expanded to [P, ...]
    coefficient: Tensor  # float64 [2, P], of ``Forward``
    grad_loss: Tensor  # scalar of any float dtype
    wanted: tuple[bool, bool] = (True, True)  # whose gradient is asked for: winner's, loser's
    into: WinnerLoser | None = (
        None  # where both gradients go; None: tensors are made for those that are wanted
    )

    def places(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the tensors to fill, of winner and loser; None where no gradient is wanted."""
        if self.into is not None:
            return self.into
        winner, loser = self.policy
        return (
            torch.empty_like(winner) if self.wanted[0] else None,
            torch.empty_like(loser) if self.wanted[1] else None,
        )


class Backend(Protocol):
    """The module of a backend. ``reference.py`` holds the formulas that every backend follows.

    Arithmetic on elements is float32 (float64 when an input is float64) after exact upcasts. Sums are float32
    or better, in an order that depends on n alone. The few numbers per pair are float64.
    """

    def forward(
        self, tensors: PairTensors, noise: TargetNoise | None, mask: Mask | None, options: Options
    ) -> Forward:
        """Compute the results and the coefficients of their gradients."""
        ...

    def gradient(self, inputs: GradientInputs) -> tuple[Tensor | None, Tensor | None]:
        """Fill ``inputs.places()`` and return them.

        A gradient is 2 * grad_loss * coefficient * (policy - target), 0 where the mask is False, in its policy's dtype.
        """
        ...
