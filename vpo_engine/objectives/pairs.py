"""From scored candidates to winner and loser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The winner and loser of each prompt.

    winner, loser: int64 [P], candidate numbers. gap: float32 [P], score of the winner minus score of the loser.
    kept: bool [P], False where the gap is a tie: such a prompt is not trained on.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor
    kept: Tensor


def select_pairs(scores: Tensor, min_gap: float = 0.0) -> Pairs:
    """Best and worst of scores [P, N] (Algorithm 1); gaps of at most ``min_gap`` are ties.

    Of equal scores the lower candidate number is taken, so that the choice is deterministic. ValueError if a
    score is not finite: a failed scorer never becomes data.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [P, N] with N >= 2, got {list(scores.shape)}")
    if not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {bad[0]}, candidate {bad[1]} of this step is {scores[tuple(bad)].item()}; "
            "every score must be finite. Look at the reward model and its input before going on"
        )
    winner = scores.argmax(dim=1)
    loser = scores.argmin(dim=1)
    gap = (scores.gather(1, winner[:, None]) - scores.gather(1, loser[:, None])).squeeze(1).float()
    return Pairs(winner, loser, gap, gap > min_gap)
