"""Turn a scorer's dimensions into the one number per video that preferences are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Dimensions = Sequence[str] | Mapping[str, float]
"""The chosen dimensions: one name (a string too), several (their average), "global" for all, or {name: weight}."""
Normalise = Literal["none", "group"]
MOTION = "motion"
"""The extra score beside a reward's dimensions where guards.motion_floor is set; it is not part of "global"."""


def check_dimensions(dimensions: Dimensions, known: Sequence[str]) -> tuple[str, ...]:
    """Return the dimensions that are meant, of those that the scorer has: all ``known`` for "global" alone.

    Raise ValueError for no dimension, one named twice, and one that the scorer does not have.
    """
    names = (dimensions,) if isinstance(dimensions, str) else tuple(dimensions)
    if names == ("global",) and not isinstance(dimensions, Mapping):
        return tuple(name for name in known if name != MOTION)
    listed = ", ".join(known)
    if not names:
        raise ValueError(f'no reward dimension selected; name some of {listed}, or "global" alone for all')
    for name in names:
        if name not in known:
            raise ValueError(
                f'unknown reward dimension {name!r}; this scorer has {listed}; "global" alone stands for all'
            )
    if len(set(names)) < len(names):
        raise ValueError(
            f"reward dimensions {list(names)} name one twice; name each once, and give weights as "
            "{name: weight, name: weight}"
        )
    return names


def combine(scores: Mapping[str, Tensor], dimensions: Dimensions, normalise: Normalise = "none") -> Tensor:
    """Return the weighted average of the chosen dimensions, float32, in the shape of ``scores``.

    scores: {dimension: [...]}, all of one shape. dimensions: of a mapping the weights, above 0, which are divided by
    their sum, so that the result keeps the dimensions' scale; else all weigh alike (OnlineVPO, table 4b: a single
    dimension or "global", the average of all).
    normalise: "group" takes of each dimension its ``standard_scores`` among the candidates of a prompt first; scores
    are then [..., N].

    Raise ValueError as ``check_dimensions`` does.
    """
    names = check_dimensions(dimensions, tuple(scores))
    parts = [scores[name].float() for name in names]
    if normalise == "group":
        parts = [standard_scores(part) for part in parts]
    if not isinstance(dimensions, Mapping):
        return torch.stack(parts).mean(dim=0)
    total = sum(dimensions.values())
    weighted = [dimensions[name] / total * part for name, part in zip(names, parts, strict=True)]
    return torch.stack(weighted).sum(dim=0)


def chosen(scores: Mapping[str, Tensor], dimensions: Dimensions) -> Tensor:
    """Return the chosen dimensions of scores {dimension: [...]} as float32 [D, ...].

    Raise ValueError as ``check_dimensions`` does.
    """
    return torch.stack([scores[name].float() for name in check_dimensions(dimensions, tuple(scores))])


def standard_scores(scores: Tensor) -> Tensor:
    """Return how many standard deviations each of scores [..., N] lies above the mean of its N, float32.

    The deviation is that of the N themselves (divided by N); 0 where all N are equal. So every dimension has the same
    say in a sum, whatever its scale.
    """
    exact = scores.double()
    off = exact - exact.mean(dim=-1, keepdim=True)
    spread = off.square().mean(dim=-1, keepdim=True).sqrt()
    constant = scores.amax(dim=-1, keepdim=True) == scores.amin(dim=-1, keepdim=True)
    return torch.where(constant, 0.0, off / spread.where(~constant, 1.0)).float()
