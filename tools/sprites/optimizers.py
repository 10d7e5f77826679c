"""The optimizer of all parts of the sprites world: Muon for matrices and convolutions, Adam for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Log = Callable[[str], None]
"""Prints a line of progress."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32: it steps along the semi-orthogonal matrix nearest to the momentum.

    torch.optim.Muon orthogonalises in bfloat16, which is a hundred times slower on a CPU without bfloat16
    arithmetic, and it accepts matrices only. Here a weight is seen as [rows, columns], where a convolution's
    columns are its inputs and taps, and its update is scaled by sqrt(max(1, rows / columns)).
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(weights), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(_orthogonal(update).view_as(weight), alpha=-group["lr"] * scale)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1 by five Newton-Schulz steps of a quintic polynomial."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class MuonAndAdam:
    """Steps Muon and Adam with one schedule: a warm-up of 30 steps, then a linear decay to 2 % of the peak."""

    def __init__(
        self, module: nn.Module, steps: int, muon_lr: float, adam_lr: float, smallest: int = 8
    ) -> None:
        """Give weights of two or more dimensions and at least ``smallest`` rows to Muon, and the rest to Adam."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        weights = [p for p in parameters if p.dim() >= 2 and p.shape[0] >= smallest]
        chosen = {id(p) for p in weights}
        others = [p for p in parameters if id(p) not in chosen]
        self.parameters, self.steps, self.done = parameters, steps, 0
        self._rates = (muon_lr, adam_lr)
        self._optimizers = (Muon(weights, muon_lr), torch.optim.Adam(others, adam_lr, betas=(0.9, 0.98)))

    def step(self, loss: Tensor) -> None:
        factor = min(1.0, (self.done + 1) / 30, 1.02 - self.done / self.steps)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        self.done += 1

    def run(self, loss_of: Callable[[], Tensor], what: str, log: Log) -> None:
        """Do all remaining steps, and log a line every hundred steps."""
        while self.done < self.steps:
            loss = loss_of()
            self.step(loss)
            if self.done % 100 == 0 or self.done == self.steps:
                log(f"{what}: step {self.done}/{self.steps}, loss {loss.item():.4f}")
