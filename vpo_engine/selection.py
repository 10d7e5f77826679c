"""The selector: it makes one number of each candidate's scores, finds winner and loser, and makes the step's pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.rewards.combine import chosen, combine
from vpo_engine.rewards.guards import MotionFloor
from vpo_engine.values import Candidate, Choice, Pair


class Selector:
    """The configured choice: which scores count, which pair is taken, what a tie is, and how much a pair weighs."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self._config, self._processes = config, processes
        floor = config.guards.motion_floor
        self._floor = None if floor is None else MotionFloor(floor)

    def scalar(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the one number per candidate that pairs are made of, float32 [P, N], of scores {dimension: [P, N]}."""
        return combine(scores, self._config.reward.dimensions, self._config.reward.normalise)

    def extremes(self, scores: Mapping[str, Tensor], keep: int) -> Tensor:
        """Return the numbers [P, keep], ascending, of each prompt's best and worst candidates by preview scores.

        Candidates that must not win (guards.motion_floor) count as the worst of their prompt.
        """
        selected = self.scalar(scores)
        if self._floor is not None:
            selected = self._floor.lower(selected, scores)
        return extremes(selected, keep)

    def choose(self, candidates: Sequence[Sequence[Candidate]]) -> list[Choice]:
        """Return winner and loser of the candidates of each prompt; all prompts have equally many."""
        scores = _stacked([[candidate.scores for candidate in each] for each in candidates])
        selected = self.scalar(scores)
        by_dimension = None
        if self._config.pairs.rule == "pareto":
            by_dimension = chosen(scores, self._config.reward.dimensions)
        barred = None if self._floor is None else self._floor.still(scores)
        found = select_pairs(selected, self._config.pairs.min_gap, by_dimension, barred)
        return [
            Choice(
                tuple(each),
                tuple(selected[row].tolist()),
                winner=each[int(found.winner[row])],
                loser=each[int(found.loser[row])],
                gap=float(found.gap[row]),
                tied=bool(found.tied[row]),
            )
            for row, each in enumerate(candidates)
        ]

    def pairs(self, choices: Sequence[Choice]) -> list[Pair]:
        """Return the pairs to learn from, without ties, with the weights of their losses."""
        here = self._processes.device
        # All members of a team count their pairs, which cancels in the mean.
        weights = gap_weights(
            [choice.gap for choice in choices],
            [choice.tied for choice in choices],
            self._config.pairs.gap_power,
            lambda sums: self._processes.sum(sums.to(here)),
        )
        return [
            Pair(choice.winner, choice.loser, choice.gap, weight)
            for choice, weight in zip(choices, weights, strict=True)
            if not choice.tied
        ]

    def metrics(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Return means over the prompts of all processes; scores are those of the candidates of the first attempt."""
        rollout, config = self._config.rollout, self._config
        count = rollout.keep or rollout.candidates
        scores = _stacked([[one.scores for one in choice.candidates[:count]] for choice in choices])
        tied = torch.tensor([choice.tied for choice in choices])
        means = {f"reward/{name}": value.mean() for name, value in scores.items()}
        known = {
            *scores,
            "global",
        }  # of pairs from elsewhere there may be no scores, or those of another reward
        if scores and known.issuperset(config.reward.dimensions):
            means["reward/selected"] = combine(scores, config.reward.dimensions).mean()
        if self._floor is not None and config.card.candidates:
            means["guards/still"] = self._floor.still(scores).float().mean()
        means["reward/gap"] = torch.tensor([choice.gap for choice in choices]).mean()
        means["tie_rate"] = tied.float().mean()
        if config.pairs.resample and config.offline_dpo is None:
            resampled = torch.tensor([len(choice.candidates) > count for choice in choices])
            means["tie_rate_before_resample"] = (tied | resampled).float().mean()
        summed = self._processes.sum(torch.stack([*means.values()]).to(self._processes.device))
        return dict(zip(means, (summed / self._processes.count).tolist(), strict=True))


def _stacked(scores: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Tensor]:
    """Return scores of [P][N] candidates as {dimension: float32 [P, N]}."""
    return {
        name: torch.tensor([[candidate[name] for candidate in each] for each in scores])
        for name in scores[0][0]
    }


@dataclass(frozen=True)
class Selected:
    """The winner and the loser among each prompt's candidates.

    winner, loser: int64 [P], places among the prompt's candidates. gap: float32 [P], the winner's score minus the
    loser's. tied: bool [P], True where there is no pair to learn from.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor
    tied: Tensor


def select_pairs(
    scores: Tensor, min_gap: float = 0.0, parts: Tensor | None = None, barred: Tensor | None = None
) -> Selected:
    """Return best and worst of scores [P, N] (Algorithm 1); gaps of at most ``min_gap`` are ties.

    parts: [D, P, N], the dimensions that the scores are made of, for the Pareto rule: the winner is no worse than the
    loser in any of them. Where best and worst violate it, the pair of the widest gap among those that satisfy it is
    taken; where none with a gap above ``min_gap`` does, the prompt is a tie.
    barred: [P, N], True for candidates that must not win; they may lose. A prompt is a tie where no other candidate has
    a gap above ``min_gap``.
    Of equal scores and gaps the lower places are taken, so that the choice is deterministic. Raise ValueError if a
    score is not finite: a failed scorer never becomes data.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [P, N] with N >= 2, got {list(scores.shape)}")
    _check_finite(scores, "", "Look at the reward model and its input before going on")
    if barred is None:
        barred = torch.zeros_like(scores, dtype=torch.bool)
    winner = scores.masked_fill(barred, -torch.inf).argmax(dim=1)
    loser = scores.argmin(dim=1)
    allowed = ~barred.all(dim=1)
    if parts is not None:
        winner, loser, allowed = _pareto(scores, parts, barred, winner, loser)
    gap = (scores.gather(1, winner[:, None]) - scores.gather(1, loser[:, None])).squeeze(1).float()
    return Selected(winner, loser, gap, ~(allowed & (gap > min_gap)))


def _pareto(
    scores: Tensor, parts: Tensor, barred: Tensor, best: Tensor, worst: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return winner and loser [P] that satisfy the rule, and where there are any, bool [P].

    Best and worst are taken where they satisfy it, and also where no pair does.
    """
    fine = (parts.unsqueeze(3) >= parts.unsqueeze(2)).all(dim=0)  # [P, N, N]: row no worse than column
    fine &= ~barred.unsqueeze(2) & ~torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    gaps = (scores.unsqueeze(2) - scores.unsqueeze(1)).masked_fill(~fine, -torch.inf)
    widest = gaps.flatten(1).argmax(dim=1)
    prompts = torch.arange(len(scores), device=scores.device)
    extremes_hold = fine[prompts, best, worst] | ~fine.flatten(1).any(dim=1)
    winner = torch.where(extremes_hold, best, widest // scores.shape[1])
    loser = torch.where(extremes_hold, worst, widest % scores.shape[1])
    return winner, loser, fine[prompts, winner, loser]


def extremes(scores: Tensor, keep: int) -> Tensor:
    """Return the numbers, int64 [P, keep] ascending, of each prompt's best and worst candidates by scores [P, N].

    The better half of ``keep`` (with the odd one) comes from the top, the rest from the bottom; of equal scores the
    lower candidate number counts as the better. Raise ValueError if a score is not finite.
    """
    _check_finite(
        scores,
        " on its preview",
        "Look at the reward model, or raise rollout.prune.after or rollout.explore.steps",
    )
    assert 2 <= keep <= scores.shape[1]
    order = scores.argsort(dim=1, descending=True, stable=True)
    worst = keep // 2
    return torch.cat([order[:, : keep - worst], order[:, -worst:]], dim=1).sort(dim=1).values


def _check_finite(scores: Tensor, where: str, remedy: str) -> None:
    if not torch.isfinite(scores).all():
        prompt, candidate = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {prompt}, candidate {candidate} of this step is {scores[prompt, candidate].item()}"
            f"{where}; every score must be finite. {remedy}"
        )


def gap_weights(
    gaps: Sequence[float],
    tied: Sequence[bool],
    power: float,
    everywhere: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> list[float]:
    """Return the weight of each pair's loss: gap^power over its mean among the pairs of the step, and 0 for ties.

    So weights have mean 1, and the learning rate keeps its meaning. power 0 weighs all alike, 1 in proportion to the
    gap. Weights are rounded to float32. everywhere: sums a tensor over processes, so that the mean is that of all.
    """
    untied = ~torch.tensor(tied)
    if power == 0:
        return untied.float().tolist()
    powers = torch.where(untied, torch.tensor(gaps, dtype=torch.float64) ** power, 0.0)
    total, count = everywhere(torch.stack([powers.sum(), untied.sum()])).tolist()
    return (powers * (count / total)).float().tolist() if count else powers.tolist()
