"""Algorithm 1 of OnlineVPO (arXiv 2412.15159, section 3), as the paper writes it.

for each step:
    sample N videos per prompt from the current policy          rollout/sampler.py
    decode and score them with the video reward                 rollout/sampler.py
    winner = argmax, loser = argmin                             selection.py
    one Diffusion-DPO update on their latents                   objectives/dpo.py
    every K optimizer steps: reference <- policy                reference/store.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from vpo_engine.config import Config
from vpo_engine.data.prompts import Stream
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.batches import Batches
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.method import Method, Step, Work
from vpo_engine.metrics.candidate_statistics import WatchedReward, candidate_statistics
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.objectives.dpo import DPO
from vpo_engine.protocols import Network, ReferenceStore, Reward
from vpo_engine.rewards.guards import WithMotion
from vpo_engine.rollout.quantised_copy import SamplingCopy
from vpo_engine.rollout.sampler import CandidateSampler, Denoiser, VideoScorer
from vpo_engine.rollout.shared_scores import SharedScorer
from vpo_engine.selection import Selector
from vpo_engine.values import Choice, Pair, Prompt, check_latents
from vpo_engine.video_model import VideoModel

_MOST_STEPS_WITHOUT_PAIRS = 20
"""After so many steps in a row without a single pair the run stops: a constant reward teaches nothing."""


class OnlineVPO(Method):
    """The policy, its reference, the reward and the optimizer, and how one step changes them."""

    counters = ("refreshed_at", "steps_without_pairs")
    reference: ReferenceStore

    def __init__(
        self,
        config: Config,
        model: VideoModel,
        reward: Reward,
        reference: ReferenceStore,
        processes: Processes,
        idle_offload: IdleOffload | None = None,
        stream: Stream | None = None,
    ) -> None:
        """Build the objective and the sampler of candidates, and what all methods have."""
        super().__init__(config, model, reward, reference, processes, idle_offload, stream)
        self.refreshed_at = 0
        self.steps_without_pairs = 0
        self.selector = Selector(config, processes)
        self.sampler = self._build_sampler()
        self.objective = DPO(
            model,
            config.objective,
            config.rollout.guidance,
            config.seed,
            config.memory.sequential,
            before_micro_batch=self.stopping.check,
            backward=self.optimizer.backward,
            sampled_from=self.sampler.sampled_from,
        )
        # Stages are timed, and idle parts are sent to the host, around the functions that do the work.
        self._sample = self.timer.timed("rollout", self.sampler.sample)
        self._update_policy = self.timer.timed("update", self._update)
        self._refresh_reference = self.timer.timed("refresh", self._refresh)
        self._backward = self.idle_offload.during("update", self.objective.backward)

    def step(self, prompts: Sequence[Prompt]) -> Step:
        """Make one step of Algorithm 1 on this team's prompts.

        If the run is asked to stop before weights have changed, raise StepAbandonedError.
        """
        with self.stopping.stoppable(together=self.processes.team.count > 1), self.optimizer.whole():
            choices = self._choose(prompts)
        pairs = self.selector.pairs(choices)  # without ties, weighted
        for update in range(self.config.objective.updates_per_rollout):
            metrics = self._update_policy(pairs, choices[0], update)  # Diffusion-DPO on the latents
            self._refresh_reference()  # every K optimizer steps: reference <- policy
        self._check_learning(metrics, choices)
        return self._learned(choices, pairs, metrics)

    def _choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        candidates = self._sample(prompts)  # N videos per prompt, decoded and scored
        return self._resample_ties(self.selector.choose(candidates))  # winner = argmax, loser = argmin

    def _resample_ties(self, choices: list[Choice]) -> list[Choice]:
        """Sample N more candidates for prompts that are a tie, and choose among all of theirs, pairs.resample times."""
        for attempt in range(1, 1 + self.config.pairs.resample):
            tied = [choice for choice in choices if choice.tied]
            if not tied:
                break
            more = self._sample([choice.prompt for choice in tied], attempt)
            again = self.selector.choose(
                [[*choice.candidates, *added] for choice, added in zip(tied, more, strict=True)]
            )
            anew = iter(again)
            choices = [next(anew) if choice.tied else choice for choice in choices]
        return choices

    def _update(self, pairs: Sequence[Pair], spare: Choice, update: int) -> dict[str, float]:
        """Make one optimizer step on the pairs of all processes, or none where there are no pairs.

        spare: any choice of this process, for the passes that add nothing, in which a process with fewer micro-batches
        keeps step with the others. At the start and right after a whole refresh the policy is the
        reference, every margin is 0, and there is no implicit accuracy.
        """
        team, here = self.processes.team, self.processes.device
        mine = team.rank_range(len(pairs) * self.config.objective.timesteps_per_pair)
        total = int(self.processes.sum(torch.tensor(len(pairs), device=here))) // self.processes.team_size
        sums = torch.zeros(len(DPO.METRICS) + 1, dtype=torch.float64, device=here)
        whole = self.config.reference.refresh_share == 1
        refreshed = self.optimizer_steps == self.refreshed_at and (whole or not self.optimizer_steps)
        rate = self._begin_update()
        unchanged = update == 0 and not self.config.memory.step_in_backward
        together = self.optimizer.in_lockstep
        spare_passes = self._passes_behind(len(mine)) if together else 0
        with self.stopping.stoppable(together) if unchanged else nullcontext():
            if len(mine):
                local = self._backward(
                    pairs,
                    self.reference,
                    update=update,
                    samples=mine,
                    total=total * self.config.objective.timesteps_per_pair,
                    processes=self.processes.count,
                )
                sums += torch.tensor([local[name] for name in (*DPO.METRICS, "samples")], device=here)
            for _ in range(spare_passes):
                pair = Pair(spare.winner, spare.loser)
                self._backward([pair], self.reference, update=update, samples=range(1), processes=0)
        metrics: dict[str, float] = {"pairs": total, "lr": rate}
        if total:
            *totals, samples = self.processes.sum(sums).tolist()
            metrics |= DPO.means(totals, samples, total)
            if refreshed:
                del metrics["implicit_accuracy"]
            metrics["grad_norm"] = self._end_update(metrics["loss"])
        return metrics

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state({"steps_without_pairs": 0, **state})  # earlier versions did not save it

    def _passes_behind(self, samples: int) -> int:
        """Return how many micro-batches fewer this process has than another one."""
        size = self.config.objective.micro_batch_size or max(1, samples)
        passes = -(-samples // size)
        return self.processes.largest(passes) - passes

    def _refresh(self) -> None:
        """Copy the policy into the reference after every K optimizer steps; steps without an update do not count."""
        every = self.config.refresh_every
        if every and self.optimizer_steps - self.refreshed_at >= every:
            with self.idle_offload.phase("refresh"):
                self.reference.refresh(self.model.network, self.optimizer.gathered)
            self.refreshed_at = self.optimizer_steps

    def _check_learning(self, metrics: Mapping[str, float], choices: Sequence[Choice]) -> None:
        """Raise ValueError after so many steps without pairs that the reward cannot tell candidates apart."""
        self.steps_without_pairs = 0 if metrics["pairs"] else self.steps_without_pairs + 1
        if self.steps_without_pairs >= _MOST_STEPS_WITHOUT_PAIRS:
            step = 1 + choices[0].prompt.position // self.config.pairs_per_step
            raise ValueError(
                f"every pair of the last {_MOST_STEPS_WITHOUT_PAIRS} steps (to step {step}) was a tie at "
                f"pairs.min_gap={self.config.pairs.min_gap}: the reward does not tell the candidates apart. Lower it, "
                "choose other reward.dimensions, or raise rollout.candidates"
            )

    def _learned(self, choices: list[Choice], pairs: list[Pair], metrics: dict[str, float]) -> Step:
        metrics |= self.selector.metrics(choices)
        prompts = [choice.prompt.text for choice in choices]
        if watched := self.watched.take(prompts, self.processes):  # videos were sampled in this step
            metrics |= watched | candidate_statistics(choices, self.processes)
        metrics["reference_age"] = self.optimizer_steps - self.refreshed_at
        metrics |= {f"reference/{name}": value for name, value in self.reference.numbers().items()}
        objective, rollout = self.config.objective, self.config.rollout
        guided = objective.branch == "guided" and rollout.guidance != 1.0
        passes = objective.timesteps_per_pair * objective.updates_per_rollout * (2 if guided else 1)
        rows = 2 * passes * len(pairs) / self.processes.team_size
        sampled = sum(network.take() for network in self._networks) / self.processes.sequence.count
        return self._step_made(metrics, Work(sampled, rows, rows, self._videos), choices, pairs)

    @property
    def _videos(self) -> int:
        """Return how many videos all processes sample in a step, without those of ``pairs.resample``."""
        return self.config.pairs_per_step * self.config.rollout.candidates

    def _refresh_copy(self) -> None:
        if self.copy is not None:
            self.copy.refresh()

    def _build_sampler(self) -> CandidateSampler:
        """Return the sampler of candidates, for which the policy, the reference or a rounded copy predicts."""
        config, model, device = self.config.rollout, self.model, self.processes.device
        alone = self.processes.sequence.count == 1 and self.processes.team.couple is None
        batches = Batches(config.batch_limit, halved=alone)
        exact: Network = self.reference if config.source == "reference" else model.network
        bits = config.first_pass.weights
        self.copy = None if bits == "policy" else SamplingCopy(model.network, bits)
        first = exact if self.copy is None else self.copy
        check = self.stopping.check
        self._networks = (
            CountedRows(first, check),
            CountedRows(exact if config.weights == "policy" else first, check),
        )
        self.watched = WatchedReward(self.reward)
        reward = self.watched if self.config.guards.motion_floor is None else WithMotion(self.watched)
        scorer = VideoScorer(
            self.timer.timed(
                "decode", self.stopping.before(lambda latents: model.decode(check_latents(latents)))
            ),
            self.idle_offload.during(
                "reward", self.stopping.before(lambda videos, texts: reward.score(videos, texts))
            ),
            reward.dimensions,
            batches,
            overlap=config.overlap,
            take_turns=self.idle_offload.active,
        )
        denoiser = Denoiser(model, batches, device)
        return CandidateSampler(
            config,
            self.config.seed,
            model.latent_shape,
            self._networks,
            self.idle_offload.during("rollout", self._refresh_copy),
            model.start,
            self.idle_offload.during("rollout", denoiser),
            scorer.overlapped,
            self.timer.timed("reward", SharedScorer(scorer, reward.dimensions, self.processes.sequence)),
            self.selector.extremes,
            self.processes.team,
            None if config.preview_frames is None else model.prefix(config.preview_frames)[0],
            share=self.stopping.share,
        )
