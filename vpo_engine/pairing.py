"""From scored candidates to the pairs of a step: the rule, more candidates for ties, weights, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.stages import Stages
from vpo_engine.objectives.pairs import Pairs, gap_weights, select_pairs
from vpo_engine.protocols import TextEmbedding
from vpo_engine.rewards.combine import chosen, combine
from vpo_engine.rewards.guards import MotionFloor
from vpo_engine.rollout.pool import Pool
from vpo_engine.sampling import Sampling


class Pairing:
    """How a run's configuration makes pairs."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self._config, self._processes = config, processes
        floor = config.guards.motion_floor
        self._floor = None if floor is None else MotionFloor(floor)

    def select(self, scores: Mapping[str, Tensor]) -> Pairs:
        """Winner and loser of scores {dimension: float32 [P, N]}, all N of every prompt."""
        reward, rule = self._config.reward, self._config.pairs
        parts = chosen(scores, reward.dimensions) if rule.rule == "pareto" else None
        barred = None if self._floor is None else self._floor.still(scores)
        return select_pairs(combine(scores, reward.dimensions, reward.normalise), rule.min_gap, parts, barred)

    def refill(
        self,
        sampling: Sampling,
        pool: Pool,
        pairs: Pairs,
        prompts: Sequence[str],
        text: TextEmbedding,
        positions: Sequence[int],
        stages: Stages,
    ) -> tuple[Pool, Pairs]:
        """N more candidates for prompts that are a tie, up to pairs.refill times; pairs are made of all they have."""
        for block in range(1, 1 + self._config.pairs.refill):
            tied = (~pairs.kept).nonzero().squeeze(1)
            if not len(tied):
                break
            rows = tied.tolist()
            more = sampling.candidates(
                [prompts[row] for row in rows], text[tied], [positions[row] for row in rows], stages, block
            )
            pool = pool.wider(tied, more)
            # Prompts that are still tied have been refilled in every round: their rows have no empty places.
            again = self.select({name: each[tied] for name, each in pool.scores.items()})
            pairs = pairs.with_rows(tied, again)
        return pool, pairs

    def weights(self, pairs: Pairs) -> Tensor:
        """Weights of the pairs' losses, float32 [P], 0 for ties."""
        here, power = self._processes.device, self._config.pairs.gap_power
        # Of every member of a team, which cancels.
        return gap_weights(pairs, power, lambda sums: self._processes.sum(sums.to(here)))

    def metrics(self, scores: Mapping[str, Tensor], pairs: Pairs, first: Pairs) -> dict[str, float]:
        """Means over the prompts of all processes, of scores over their first candidates; ``first``: before refill."""
        rollout = self._config.rollout
        count = rollout.keep or rollout.candidates
        scores = {name: value[:, :count] for name, value in scores.items()}
        means = {f"reward/{name}": value.mean() for name, value in scores.items()}
        means["reward/selected"] = combine(scores, self._config.reward.dimensions).mean()
        if self._floor is not None and rollout.source != "ledger":
            means["guards/still"] = self._floor.still(scores).float().mean()
        means["reward/gap"] = pairs.gap.mean()
        means["tie_rate"] = (~pairs.kept).float().mean()
        if self._config.pairs.refill:
            means["tie_rate_before_refill"] = (~first.kept).float().mean()
        summed = self._processes.sum(torch.stack([*means.values()]).to(self._processes.device))
        return dict(zip(means, (summed / self._processes.count).tolist(), strict=True))
