"""Weights of pairs by their time, inside the sigmoid: they choose the space in which beta is constant."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Space = Literal["prediction", "epsilon", "x0"]
_SPACES = get_args(Space)  # here, because torch.compile of torch 2.6 does not know get_args


def error_weight(space: Space, signal: Tensor, noise: Tensor) -> Tensor:
    """Return the factors of beta, [P], that make errors count as in ``space`` though velocities are compared.

    signal, noise: [P], the a and s of x_t = a * x0 + s * noise; for rectified flow 1 - t and t. The prediction is
    the flow's velocity (noise - x0 or x0 - noise) or v of Salimans and Ho (a * noise - s * x0): either way an
    error of the prediction is one of s times its size in x0 and of a times its size in the noise. So the weight
    is a^2 for ``epsilon``, s^2 for ``x0``, 1 for ``prediction``.

    Constant beta on velocities is what published flow trainers use and what VideoReward (arXiv 2501.13918) found
    best; epsilon is the space of Diffusion-DPO's derivation. Over uniform t both other weights average 1/3: three
    times the beta keeps margins comparable. Raise ValueError for an unknown space.
    """
    if space not in _SPACES:
        raise ValueError(f"space={space!r} must be one of: {', '.join(_SPACES)}")
    if space == "prediction":
        return signal.new_ones(signal.shape)
    return (signal if space == "epsilon" else noise).square()
