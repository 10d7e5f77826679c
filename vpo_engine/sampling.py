"""Rollout and reward of Algorithm 1: from prompts to scored candidates, in one pass or in two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.residency import Residency
from vpo_engine.metrics.stages import Stages
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.rewards.combine import combine
from vpo_engine.rewards.guards import MotionFloor
from vpo_engine.rollout.candidates import Rollout
from vpo_engine.rollout.pool import Pool
from vpo_engine.rollout.prune import extremes
from vpo_engine.rollout.weights import SamplingCopy
from vpo_engine.scoring import Ahead, Scoring


class Sampling:
    """Samples with the policy, the reference or a copy of the policy, as the configuration says, and scores."""

    def __init__(
        self,
        config: Config,
        exact: Network,
        copy: SamplingCopy | None,
        rollout: Rollout,
        scoring: Scoring,
        team: Processes,
        residency: Residency,
    ) -> None:
        """``exact``: policy or reference. ``copy``: of the policy in 8 bits, for rollout.weights or explore.weights."""
        self._config, self._exact, self._copy = config, exact, copy
        self._rollout, self._scoring = rollout, scoring
        self._team, self._residency = team, residency

    def candidates(
        self,
        prompts: Sequence[str],
        text: TextEmbedding,
        positions: Sequence[int],
        stages: Stages,
        block: int = 0,
    ) -> Pool:
        """The team's candidates of prompts at these positions of the stream, finished and scored.

        block: they are candidates block * N to (block + 1) * N - 1 of their prompts.
        """
        samplers = self._samplers()
        latents, numbers, ahead = self._sampled(samplers, prompts, text, positions, stages, block)
        scores = self._scoring.score(latents, prompts, stages, ahead)
        latents, scores = self._of_the_team(latents, scores)
        return Pool(latents, scores, numbers, sum(sampler.rows for sampler in samplers))

    def _samplers(self) -> tuple[CountedRows, CountedRows]:
        """What samples in the first pass of a rollout, and in the second where there is one."""
        first = self._exact if self._copy is None else self._copy
        exact = self._exact if self._config.rollout.weights == "policy" else first
        return CountedRows(first), CountedRows(exact)

    def _sampled(
        self,
        samplers: tuple[CountedRows, CountedRows],
        prompts: Sequence[str],
        text: TextEmbedding,
        positions: Sequence[int],
        stages: Stages,
        block: int,
    ) -> tuple[Tensor, Tensor, Ahead | None]:
        """This process's finished candidates, clean latents [P, N / team, C, T, H, W]; with rollout.prune,
        [P, keep / team, ...], and with rollout.explore [P, 2 / team, ...]. The numbers of all of the team's. What
        scores them already."""
        config, ahead = self._config, self._scoring.ahead(prompts)
        count, keep = config.rollout.candidates, config.rollout.keep
        numbers = torch.arange(block * count, (block + 1) * count).repeat(len(prompts), 1)
        with stages("rollout"), self._residency.phase("rollout"):
            if self._copy is not None:
                self._copy.refresh()
            begun = self._rollout.begin(samplers[0], text, positions, ahead, block)
        if keep is None:
            return begun.latents, numbers, ahead
        previews = self._scoring.score(begun.preview, prompts, stages, ahead)
        latents, scores = self._of_the_team(begun.latents, previews)
        selected = combine(scores, config.reward.dimensions, config.reward.normalise)
        if config.guards.motion_floor is not None:
            selected = MotionFloor(config.guards.motion_floor).lower(selected, scores)
        numbers = numbers.gather(1, extremes(selected, keep).cpu())
        ahead = self._scoring.ahead(prompts)
        with stages("rollout"), self._residency.phase("rollout"):
            return self._rollout.finish(samplers[1], text, latents, selected, ahead), numbers, ahead

    def _of_the_team(self, candidates: Tensor, scores: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Candidates [P, n, ...] and scores [P, n] of this process to those of its team, [P, team * n, ...]."""
        team = self._team
        return team.gather(candidates, 1), {name: team.gather(value, 1) for name, value in scores.items()}
