"""Algorithm 1 of OnlineVPO (arXiv 2412.15159, section 3), as the paper writes it.

for each step:
    sample N videos per prompt from the current policy          rollout
    decode and score them with the video reward                 reward
    winner = argmax, loser = argmin                             pair
    one Diffusion-DPO update on their latents                   update
    every K optimizer steps: reference <- policy                refresh
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer, learning_rate
from vpo_engine.memory.residency import Residency
from vpo_engine.metrics.stages import Stages
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.objectives.dpo import DPO, PreferenceBatch
from vpo_engine.objectives.pairs import Pairs, select_pairs
from vpo_engine.protocols import Network, ReferenceStore, Reward, TextEmbedding, VideoModel
from vpo_engine.rewards.combine import chosen, combine
from vpo_engine.rollout.candidates import Rollout
from vpo_engine.rollout.rows import Rows
from vpo_engine.rollout.weights import SamplingCopy
from vpo_engine.scoring import Scoring


@dataclass
class Step:
    """What one step made: for the log (metrics) and for the gallery (this team's candidates and pairs).

    candidates: clean latents [P, N, C, T, H, W], with rollout.prune or explore those of the finished candidates.
    rows: that this process's rollout sent through the network.
    """

    metrics: dict[str, float]
    candidates: Tensor
    scores: dict[str, Tensor]
    pairs: Pairs
    seconds: dict[str, float] = field(default_factory=dict)
    rows: int = 0


class OnlineVPO:
    """The policy, its reference, the reward and the optimizer, and how one step changes them."""

    def __init__(
        self,
        config: Config,
        model: VideoModel,
        reward: Reward,
        reference: ReferenceStore,
        processes: Processes,
        residency: Residency | None = None,
    ) -> None:
        """``residency`` knows the model's and the reward's tensors already (None: everything stays where it is)."""
        self.config, self.model, self.reward, self.reference = config, model, reward, reference
        self.processes = processes
        self.rows = Rows(config.rollout.rows)
        self.rollout = Rollout(
            model, config.rollout, config.seed, processes.device, self.rows, processes.team
        )
        self.objective = DPO(
            model, config.objective, config.rollout.guidance, config.seed, config.memory.sequential
        )
        self.parameters = [p for p in model.network.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the policy requires a gradient; there is nothing to train")
        if config.memory.step_in_backward and processes.count > 1:
            raise ValueError(
                f"memory.step_in_backward=true excludes {processes.count} processes: each would step by its own "
                "gradients, before their mean is known. Run one process, or set it to false"
            )
        self.optimizer = PolicyOptimizer(
            self.parameters, config.optimizer, config.memory, seed=config.seed, following=reference.following
        )
        self.refreshed_at = 0
        self.residency = residency or Residency.everything()
        self.residency.register("reference", reference.tensors)
        self.residency.register("optimizer", self.optimizer.tensors)
        bits = config.rollout.first_pass.weights
        self.copy = None if bits == "policy" else SamplingCopy(model.network, bits)
        self.scoring = Scoring(model, reward, self.rows, self.residency)

    @property
    def optimizer_steps(self) -> int:
        return self.optimizer.steps

    def step(self, prompts: Sequence[str], text: TextEmbedding, positions: Sequence[int]) -> Step:
        """One step on this team's prompts, which stand at ``positions`` of the prompt stream."""
        stages = Stages(self.processes.device)
        samplers = self._samplers()
        candidates = self._rollout(samplers, prompts, text, positions, stages)
        scores = self.scoring.score(candidates, prompts, stages)
        candidates, scores = self._of_the_team(candidates, scores)
        pairs = self._select(scores)
        for update in range(self.config.objective.updates):
            with stages("update"):
                metrics = self._update(candidates, pairs, text, positions, update)
            with stages("refresh"):
                self._refresh()
        metrics |= self._reward_metrics(scores, pairs)
        metrics |= {
            "optimizer_steps": self.optimizer_steps,
            "reference_age": self.optimizer_steps - self.refreshed_at,
            **{f"reference/{name}": value for name, value in self.reference.numbers().items()},
            **stages.peaks(),
        }
        return Step(
            metrics, candidates, scores, pairs, stages.seconds, sum(sampler.rows for sampler in samplers)
        )

    def _samplers(self) -> tuple[CountedRows, CountedRows]:
        """What samples in the first pass of a rollout, and in the second where there is one."""
        config = self.config.rollout
        exact: Network = self.model.network if config.source == "policy" else self.reference
        first = exact if self.copy is None else self.copy
        return CountedRows(first), CountedRows(exact if config.weights == "policy" else first)

    def _rollout(
        self,
        samplers: tuple[CountedRows, CountedRows],
        prompts: Sequence[str],
        text: TextEmbedding,
        positions: Sequence[int],
        stages: Stages,
    ) -> Tensor:
        """This process's finished candidates, clean latents [P, N / team, C, T, H, W]; with rollout.prune,
        [P, keep / team, ...], and with rollout.explore [P, 2 / team, ...]."""
        config = self.config
        with stages("rollout"), self.residency.phase("rollout"):
            if self.copy is not None:
                self.copy.refresh()
            begun = self.rollout.begin(samplers[0], text, positions)
        if config.rollout.keep is None:
            return begun.latents
        previews = self.scoring.score(begun.preview, prompts, stages)
        latents, scores = self._of_the_team(begun.latents, previews)
        with stages("rollout"), self.residency.phase("rollout"):
            selected = combine(scores, config.reward.dimensions, config.reward.normalise)
            return self.rollout.finish(samplers[1], text, latents, selected)

    def _of_the_team(self, candidates: Tensor, scores: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Candidates [P, n, ...] and scores [P, n] of this process to those of its team, [P, team * n, ...]."""
        team = self.processes.team
        return team.gather(candidates, 1), {name: team.gather(value, 1) for name, value in scores.items()}

    def _select(self, scores: dict[str, Tensor]) -> Pairs:
        reward, rule = self.config.reward, self.config.pairs
        parts = chosen(scores, reward.dimensions) if rule.rule == "pareto" else None
        return select_pairs(combine(scores, reward.dimensions, reward.normalise), rule.min_gap, parts)

    def _update(
        self, candidates: Tensor, pairs: Pairs, text: TextEmbedding, positions: Sequence[int], update: int
    ) -> dict[str, float]:
        team = self.processes.team
        kept = pairs.kept.nonzero().squeeze(1)
        mine = team.part(len(kept) * self.config.objective.draws)
        total = int(self.processes.sum(torch.tensor(len(kept), device=self.processes.device))) // team.count
        sums = torch.zeros(len(DPO.METRICS) + 1, dtype=torch.float64, device=self.processes.device)
        rate = learning_rate(self.config.optimizer, self.optimizer_steps, self.config.optimizer_steps)
        self.optimizer.begin(rate)
        if len(mine):
            batch = PreferenceBatch(
                winner=candidates[kept, pairs.winner[kept]],
                loser=candidates[kept, pairs.loser[kept]],
                text=text[kept],
                positions=[positions[i] for i in kept.tolist()],
                total=total,
                update=update,
                rows=mine,
            )
            with self.residency.phase("update"):
                local = self.objective.step(batch, self.reference, self.processes.count)
            sums += torch.tensor([local[name] for name in (*DPO.METRICS, "rows")], device=sums.device)
        metrics: dict[str, float] = {"pairs": total, "lr": rate}
        if total:
            *totals, rows = self.processes.sum(sums).tolist()
            metrics |= {name: value / rows for name, value in zip(DPO.METRICS, totals, strict=True)}
            with self.residency.phase("optimizer"):
                self.processes.average_gradients(self.parameters)
                metrics["grad_norm"] = self.optimizer.step()
        return metrics

    def _refresh(self) -> None:
        """reference <- policy after every K optimizer steps: steps without an update do not count."""
        every = self.config.reference.refresh_every
        if every and self.optimizer_steps - self.refreshed_at >= every:
            with self.residency.phase("refresh"):
                self.reference.refresh(self.model.network)
            self.refreshed_at = self.optimizer_steps

    def _reward_metrics(self, scores: dict[str, Tensor], pairs: Pairs) -> dict[str, float]:
        """Means over all candidates and prompts of all processes."""
        names = [f"reward/{name}" for name in scores]
        values = [value.mean() for value in scores.values()]
        selected = combine(scores, self.config.reward.dimensions).mean()
        ties = (~pairs.kept).float().mean()
        means = torch.stack([*values, selected, pairs.gap.mean(), ties]).to(self.processes.device)
        means = self.processes.sum(means) / self.processes.count
        return dict(zip([*names, "reward/selected", "reward/gap", "tie_rate"], means.tolist(), strict=True))
