"""Solvers of sampling loops; see ``video_model.Solver``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EulerFlow:
    """Euler steps along a straight flow whose network predicts the velocity: latents minus noise.

    times: of each step, from ``num_timesteps`` (noise) down to 0 (clean). lengths: what each step multiplies the
    velocity by; they add up to times[0] / num_timesteps.
    """

    times: Sequence[float]
    lengths: Sequence[float]
    num_timesteps: int = 1000

    def noise_level(self, step: int) -> float:
        """Return the time of a step as a share of ``num_timesteps``."""
        return self.times[step] / self.num_timesteps

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Follow the velocity for the length of the step; nothing is remembered."""
        return latents + prediction * self.lengths[step], memory

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        """Follow the velocity from where the step ended to the clean latents."""
        return after + prediction * (self.times[step] / self.num_timesteps - self.lengths[step])
