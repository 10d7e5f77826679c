"""The scored candidates of a step's prompts, of which some prompts may have more than others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """Candidates of P prompts, a row of M places each.

    latents: clean latents [P, M, C, T, H, W]. scores: {dimension: float32 [P, M]}. numbers: int64 [P, M], on the CPU,
    the numbers of the candidates in their prompts' noise. Rows of prompts with fewer candidates than others end in
    empty places: zeros, scores NaN, numbers -1. rows: that went through the network
    for them in this process.
    """

    latents: Tensor
    scores: dict[str, Tensor]
    numbers: Tensor
    rows: int = 0

    def wider(self, rows: Tensor, more: Pool) -> Pool:
        """With the candidates ``more`` of the prompts ``rows``, int64 [p], behind the M places; others get empty ones.

        Rows that had empty places get the new ones behind these.
        """
        return Pool(
            _wider(self.latents, rows, more.latents, 0),
            {name: _wider(value, rows, more.scores[name], torch.nan) for name, value in self.scores.items()},
            _wider(self.numbers, rows, more.numbers, -1),
            self.rows + more.rows,
        )

    def pick(self, rows: Tensor, places: Tensor) -> Tensor:
        """Latents [p, C, T, H, W] of the prompts ``rows`` at one place each, int64 [p]."""
        return self.latents[rows.to(self.latents.device), places.to(self.latents.device)]


def _wider(values: Tensor, rows: Tensor, more: Tensor, empty: float) -> Tensor:
    """Values [P, M, ...] with ``more`` [p, m, ...] behind the rows, ``empty`` behind others: [P, M + m, ...]."""
    added = values.new_full((len(values), *more.shape[1:]), empty)
    added[rows.to(values.device)] = more.to(values)
    return torch.cat([values, added], dim=1)
