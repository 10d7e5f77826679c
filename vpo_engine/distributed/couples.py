"""Teams in which two processes share every candidate: each predicts one of guidance's two branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vpo_engine.distributed.processes import Processes


@dataclass(frozen=True)
class Couple:
    """Two neighbouring processes of a team, as the ``SplitGuidance`` of a sampling loop. pair: both, as a group."""

    pair: Processes

    @property
    def half(self) -> int:
        return self.pair.rank

    def exchange(self, prediction: Tensor) -> Tensor:
        return self.pair.gather(prediction)


@dataclass(frozen=True)
class Couples:
    """The couples of a team, by the part of the candidates that each of them makes.

    Both processes of a couple make the same part. What the first of them has made is what counts, so that all members
    of the team go on with the same bits.
    """

    team: Processes

    @property
    def count(self) -> int:
        return self.team.count // 2

    def rank_range(self, total: int) -> range:
        """Return which of ``total`` items this couple makes, divided in order as evenly as possible."""
        number = self.team.rank // 2
        return range(total * number // self.count, total * (number + 1) // self.count)

    def gather(self, values: Tensor, dim: int = 0) -> Tensor:
        """Concatenate what the couples have made along ``dim``, in their order; shapes must be equal."""
        return torch.cat(self.team.gather(values, dim).chunk(self.team.count, dim)[::2], dim)
