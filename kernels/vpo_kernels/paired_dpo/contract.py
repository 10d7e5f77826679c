"""What passes between the paired loss, its backends and its users.

P pairs; a prediction is [P, ...] with n elements per sample, of which a mask may leave fewer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Reduction = Literal["mean", "sum"]
PerPair = float | Tensor
"""One number for all pairs, or a tensor [P] of any float dtype."""


class PairedDPOLoss(NamedTuple):
    """float32, or float64 when an input was float64. Gradients flow through ``loss`` only."""

    loss: Tensor  # scalar: mean over pairs of pair_weight * -logsigmoid(margin)
    margin: Tensor  # [P]: -(beta / 2) * (winner_gap - loser_gap)
    winner_gap: Tensor  # [P]: error(policy, winner) - error(reference, winner)
    loser_gap: Tensor  # [P]: the same of the loser


class Sextet(NamedTuple):
    """The six tensors of the loss, each [P, ...]. With noise beside them, the targets are clean latents."""

    policy_winner: Tensor
    policy_loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor
    target_winner: Tensor
    target_loser: Tensor


class Noise(NamedTuple):
    """Makes a target x0_scale * x0 + noise_scale * noise of what a ``Sextet`` holds as target."""

    noise: Tensor  # [P, ...], shared by winner and loser
    x0_scale: PerPair
    noise_scale: PerPair


class Mask(NamedTuple):
    """Which elements count, alike in winner and loser."""

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
    """What a backend's forward pass returns."""

    out: PairedDPOLoss
    coefficient: Tensor
    """float64 [2, P]: d loss / d (squared error of the policy, summed over the sample's elements), of winner
    and loser; the loser's carries ``loser_scaling``'s factor."""


class Backend(Protocol):
    """What computes the loss. ``reference.py`` holds the formulas that every backend follows.

    Arithmetic on elements is float32 (float64 when an input is float64) after exact upcasts, sums are float32
    or better in an order that depends on n alone, and the few numbers per pair are float64.
    """

    def forward(
        self, tensors: Sextet, noise: Noise | None, mask: Mask | None, options: Options
    ) -> Forward: ...

    def gradient(
        self,
        policy: tuple[Tensor, Tensor],
        target: tuple[Tensor, Tensor],
        noise: Noise | None,
        mask: Tensor | None,
        coefficient: Tensor,
        grad_loss: Tensor,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """2 * grad_loss * coefficient * (policy - target) of winner and loser, 0 where the mask is False.

        grad_loss: scalar tensor. Where ``wanted`` is False, None. A gradient is in its policy's dtype and is
        allocated as torch.empty_like(policy) does.
        """
        ...
