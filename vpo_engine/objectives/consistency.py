"""Consistency distillation of T2V-Turbo (arXiv 2405.18750), for rectified flow and for v-prediction alike.

A model states x_t = a * clean + s * noise and a prediction p * clean + q * noise (``VideoModel.noising_scales`` and
``target_scales``); everything here follows from these four numbers. With rectified flow the clean latents that a
prediction v = clean - noise points to are x_t + t v, and a step from t to a smaller time is one of Euler; with
v-prediction they are a x_t - s v, and the step is DDIM's. Source of constants: Ji4chenLi/t2v-turbo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 0.5
"""sigma_data of the boundary scalings."""
TIMESTEP_SCALE = 10.0
"""Times are multiplied by this before they enter the boundary scalings."""


@dataclass(frozen=True)
class Split:
    """The two parts of noisy latents by a prediction: the clean latents and the noise in them, both [B, C, T, H, W]."""

    clean: Tensor
    noise: Tensor

    def at(self, kept: Tensor, added: Tensor) -> Tensor:
        """Return latents at the time with these noising scales [B]: where the sampler's step from here ends."""
        return _wide(kept, self.clean) * self.clean + _wide(added, self.noise) * self.noise


def split(
    latents: Tensor,
    prediction: Tensor,
    noising: tuple[Tensor, Tensor],
    target: tuple[float | Tensor, float | Tensor],
) -> Split:
    """Split noisy latents by the model's prediction.

    noising: the scales (a, s) of clean latents and noise in ``latents``, each [B]. target: those (p, q) in the
    prediction, numbers or [B].
    """
    a, s = (_wide(scale, latents) for scale in noising)
    p, q = (_wide(scale, latents) for scale in target)
    determinant = a * q - s * p
    return Split((q * latents - s * prediction) / determinant, (a * prediction - p * latents) / determinant)


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c_skip, c_out) of c_skip * x_t + c_out * clean at times t in 0..1000, in the shape of t.

    c_skip = sigma^2 / ((10 t)^2 + sigma^2) and c_out = 10 t / sqrt((10 t)^2 + sigma^2), so the result at time 0 is x_0
    itself. They are for models whose latents at time 0 still hold noise.
    """
    scaled = (TIMESTEP_SCALE * t).square() + SIGMA**2
    return SIGMA**2 / scaled, TIMESTEP_SCALE * t / scaled.sqrt()


def consistency_output(latents: Tensor, t: Tensor, clean: Tensor, *, noise_at_zero: bool) -> Tensor:
    """Return f(x_t, t), the student's one-step answer; f(x_0, 0) = x_0.

    clean: that of ``split``. noise_at_zero: whether the schedule has noise at time 0. If it has none, as in rectified
    flow, the clean latents at time 0 are x_0 already, and no scalings are needed.
    """
    if not noise_at_zero:
        return clean
    skip, out = (_wide(scale, latents) for scale in boundary_scalings(t))
    return skip * latents + out * clean


def pseudo_huber(found: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Return mean(sqrt((found - target)^2 + c^2) - c), a scalar."""
    return (((found - target).square() + c**2).sqrt() - c).mean()


def guidance_embedding(w: Tensor, width: int = 256) -> Tensor:
    """Return the embedding [B, width] of guidance scales w [B] for a student whose network takes one as an input.

    It holds the sines and then the cosines of 1000 w at geometric frequencies from 1 to 1 / 10000 (latent consistency
    models, arXiv 2310.04378). An odd width ends in a zero. The exponents' step is rounded to float32, as in the public
    code.
    """
    half = width // 2
    steps = torch.arange(half, dtype=w.dtype, device=w.device)
    exponent = float(torch.tensor(math.log(10000.0)) / (half - 1))
    angles = 1000.0 * w[:, None] * torch.exp(-exponent * steps)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def _wide(scale: float | Tensor, like: Tensor) -> float | Tensor:
    """Make a scale [B] fit latents [B, ...]."""
    return scale.view(-1, *[1] * (like.dim() - 1)) if isinstance(scale, Tensor) else scale
