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
from vpo_engine.objectives.dpo import DPO, PreferenceBatch
from vpo_engine.objectives.pairs import Pairs
from vpo_engine.pairing import Pairing
from vpo_engine.protocols import Network, ReferenceStore, Reward, TextEmbedding, VideoModel
from vpo_engine.rewards.guards import WithMotion
from vpo_engine.rollout.candidates import Rollout
from vpo_engine.rollout.pool import Pool
from vpo_engine.rollout.rows import Rows
from vpo_engine.rollout.stored import StoredPairs
from vpo_engine.rollout.weights import SamplingCopy
from vpo_engine.sampling import Sampling
from vpo_engine.scoring import Scoring


@dataclass
class Step:
    """What one step made: for the log (metrics), the gallery and the ledger (this team's candidates and pairs).

    weights: float32 [P], of the pairs' losses, 0 for ties.
    """

    metrics: dict[str, float]
    pool: Pool
    pairs: Pairs
    weights: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def candidates(self) -> Tensor:
        """Clean latents [P, N, C, T, H, W], with rollout.prune or explore those of the finished candidates."""
        return self.pool.latents

    @property
    def scores(self) -> dict[str, Tensor]:
        """{dimension: float32 [P, N]}."""
        return self.pool.scores

    @property
    def rows(self) -> int:
        """Rows that this process's rollout sent through the network."""
        return self.pool.rows


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
        stored: StoredPairs | None = None,
    ) -> None:
        """``residency`` knows the model's and the reward's tensors already (None: everything stays where it is).

        ``stored``: with rollout.source=ledger, the pairs to train on in place of candidates.
        """
        self.config, self.model, self.reward, self.reference = config, model, reward, reference
        self.processes = processes
        self.rows = Rows(config.rollout.most_rows)
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
        exact: Network = reference if config.rollout.source == "reference" else model.network
        scorer = reward if config.guards.motion_floor is None else WithMotion(reward)
        scoring = Scoring(model, scorer, self.rows, self.residency, config.rollout.overlap)
        self.sampling = Sampling(
            config, exact, self.copy, self.rollout, scoring, processes.team, self.residency
        )
        self.pairing = Pairing(config, processes)
        self.stored = stored

    @property
    def optimizer_steps(self) -> int:
        return self.optimizer.steps

    def step(self, prompts: Sequence[str], text: TextEmbedding, positions: Sequence[int]) -> Step:
        """One step on this team's prompts, which stand at ``positions`` of the prompt stream."""
        stages = Stages(self.processes.device)
        if self.stored is None:
            pool = self.sampling.candidates(prompts, text, positions, stages)
            first = self.pairing.select(pool.scores)
            pool, pairs = self.pairing.refill(self.sampling, pool, first, prompts, text, positions, stages)
        else:
            pool, pairs = self.stored.compared(positions, self.model.latent_shape, self.processes.device)
            first = pairs
        weights = self.pairing.weights(pairs)
        for update in range(self.config.objective.updates):
            with stages("update"):
                metrics = self._update(pool, pairs, weights, text, positions, update)
            with stages("refresh"):
                self._refresh()
        metrics |= self.pairing.metrics(pool.scores, pairs, first)
        metrics |= {
            "optimizer_steps": self.optimizer_steps,
            "reference_age": self.optimizer_steps - self.refreshed_at,
            **{f"reference/{name}": value for name, value in self.reference.numbers().items()},
            **stages.peaks(),
        }
        return Step(metrics, pool, pairs, weights, stages.seconds)

    def _update(
        self,
        pool: Pool,
        pairs: Pairs,
        weights: Tensor,
        text: TextEmbedding,
        positions: Sequence[int],
        update: int,
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
                winner=pool.pick(kept, pairs.winner[kept]),
                loser=pool.pick(kept, pairs.loser[kept]),
                text=text[kept],
                positions=[positions[i] for i in kept.tolist()],
                total=total,
                update=update,
                rows=mine,
                weight=weights[kept] if self.config.pairs.gap_power else None,
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
