"""From scored candidates to winner and loser, and how much each pair counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _here(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Pairs:
    """The winner and loser of each prompt.

    winner, loser: int64 [P], places of the candidates in their prompt's row. gap: float32 [P], score of the winner
    minus score of the loser. kept: bool [P], False where the gap is a tie: such a prompt is not trained on.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor
    kept: Tensor

    def with_rows(self, rows: Tensor, pairs: Pairs) -> Pairs:
        """These pairs with ``pairs`` in place of those of the prompts ``rows``, int64 [p]."""
        names = ("winner", "loser", "gap", "kept")
        return replace(
            self, **{name: getattr(self, name).index_copy(0, rows, getattr(pairs, name)) for name in names}
        )


def select_pairs(
    scores: Tensor, min_gap: float = 0.0, parts: Tensor | None = None, barred: Tensor | None = None
) -> Pairs:
    """Best and worst of scores [P, N] (Algorithm 1); gaps of at most ``min_gap`` are ties.

    parts: [D, P, N], the dimensions that the scores are made of, for the Pareto rule: the winner is no worse than the
    loser in any of them. Where best and worst violate it, the pair of the widest gap among those that satisfy it is
    taken; where none with a gap above ``min_gap`` does, it is a tie.
    barred: [P, N], True for candidates that must not win; they may lose. Where no other has a gap above ``min_gap``, it
    is a tie.
    Of equal scores and gaps the lower places are taken, so that the choice is deterministic. ValueError if a score is
    not finite: a failed scorer never becomes data.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [P, N] with N >= 2, got {list(scores.shape)}")
    if not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {bad[0]}, candidate {bad[1]} of this step is {scores[tuple(bad)].item()}; "
            "every score must be finite. Look at the reward model and its input before going on"
        )
    if barred is None:
        barred = torch.zeros_like(scores, dtype=torch.bool)
    winner = scores.masked_fill(barred, -torch.inf).argmax(dim=1)
    loser = scores.argmin(dim=1)
    allowed = ~barred.all(dim=1)
    if parts is not None:
        winner, loser, allowed = _pareto(scores, parts, barred, winner, loser)
    gap = (scores.gather(1, winner[:, None]) - scores.gather(1, loser[:, None])).squeeze(1).float()
    return Pairs(winner, loser, gap, allowed & (gap > min_gap))


def _pareto(
    scores: Tensor, parts: Tensor, barred: Tensor, best: Tensor, worst: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Winner and loser [P] that satisfy the rule, the extremes where they do or where none do, and whether they do."""
    fine = (parts.unsqueeze(3) >= parts.unsqueeze(2)).all(dim=0)  # [P, N, N]: row no worse than column
    fine &= ~barred.unsqueeze(2) & ~torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    gaps = (scores.unsqueeze(2) - scores.unsqueeze(1)).masked_fill(~fine, -torch.inf)
    widest = gaps.flatten(1).argmax(dim=1)
    prompts = torch.arange(len(scores), device=scores.device)
    extremes = fine[prompts, best, worst] | ~fine.flatten(1).any(dim=1)
    winner = torch.where(extremes, best, widest // scores.shape[1])
    loser = torch.where(extremes, worst, widest % scores.shape[1])
    return winner, loser, fine[prompts, winner, loser]


def gap_weights(pairs: Pairs, power: float, everywhere: Callable[[Tensor], Tensor] = _here) -> Tensor:
    """Weights of the pairs' losses, float32 [P]: gap^power over its mean among the kept pairs of the step; 0 for ties.

    So they have mean 1, and the learning rate keeps its meaning. power 0 weighs all alike, 1 in proportion to the gap.
    everywhere: sums a tensor over processes, so that the mean is that of all of them.
    """
    if power == 0:
        return pairs.kept.float()
    powers = torch.where(pairs.kept, pairs.gap.double() ** power, 0.0)
    total, count = everywhere(torch.stack([powers.sum(), pairs.kept.sum()])).tolist()
    return (powers * (count / total)).float() if count else powers.float()
