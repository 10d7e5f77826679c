"""From a scorer's dimensions to the one number per video that preferences are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dimensions(dimensions: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The dimensions that are meant, of those that the scorer has: all ``known`` for "global" alone.

    ValueError for no dimension, one named twice, and one that the scorer does not have.
    """
    names = (dimensions,) if isinstance(dimensions, str) else tuple(dimensions)
    if names == ("global",):
        return tuple(known)
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
            f"reward dimensions {list(names)} name one twice; the average is unweighted, name each once"
        )
    return names


def combine(scores: dict[str, Tensor], dimensions: Sequence[str]) -> Tensor:
    """The plain average of the named dimensions, of ``scores``' shape, float32.

    scores: {dimension: [...]}, all of one shape. dimensions: one name, several, or "global" for all of them
    (OnlineVPO, table 4b: a single dimension or "global"). A bare string is the same as a list of it alone.

    ValueError as of ``check_dimensions``.
    """
    names = check_dimensions(dimensions, tuple(scores))
    return torch.stack([scores[name].float() for name in names]).mean(dim=0)
