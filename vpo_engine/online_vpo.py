"""Algorithm 1 of OnlineVPO (arXiv 2412.15159, section 3), as the paper writes it.

for each step:
    sample N videos per prompt from the current policy          rollout/sampler.py
    decode and score them with the video reward                 rollout/sampler.py
    winner = argmax, loser = argmin                             selection.py
    one Diffusion-DPO update on their latents                   objectives/dpo.py
    every K optimizer steps: reference <- policy                reference/store.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.memory.make_optimizer import Average, make_optimizer
from vpo_engine.memory.optimizer import learning_rate
from vpo_engine.metrics.stage_timer import StageTimer
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.objectives.dpo import DPO
from vpo_engine.protocols import Network, ReferenceStore, Reward
from vpo_engine.rewards.guards import WithMotion
from vpo_engine.rollout.batches import Batches
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.rollout.quantised_copy import SamplingCopy
from vpo_engine.rollout.sampler import CandidateSampler, Denoiser, VideoScorer
from vpo_engine.selection import Selector
from vpo_engine.values import Choice, Pair, Prompt, check_latents
from vpo_engine.video_model import VideoModel


@dataclass
class Step:
    """The results of one step, for the log, the gallery and the preference dataset.

    metrics: for the log. choices: the candidates of this team's prompts, with the best and the worst of each, ties
    included. pairs: the pairs that were trained on. seconds: of each stage. rows: how many inputs this process's
    rollout sent through the network.
    """

    metrics: dict[str, float]
    choices: list[Choice]
    pairs: list[Pair]
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
        idle_offload: IdleOffload | None = None,
        stored: StoredPairs | None = None,
    ) -> None:
        """Build the reference, the optimizer and the sampler of candidates. ``idle_offload`` knows the model's and the
        reward's tensors already (None: everything stays where it is).

        ``stored``: with rollout.source=dataset, the pairs to train on in place of candidates.
        """
        _check(config, processes)
        self.config, self.model, self.reward, self.reference = config, model, reward, reference
        self.processes, self.stored = processes, stored
        self.stopping = StopPoints(processes)
        self.idle_offload = idle_offload or IdleOffload.disabled()
        self.parameters = [p for p in model.network.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the policy requires a gradient; there is nothing to train")
        self.optimizer = make_optimizer(config, model.network, processes, reference.preserve)
        self.average = self._build_average()
        self.idle_offload.register("reference", reference.tensors)
        self.idle_offload.register("optimizer", self.optimizer.tensors)
        self.refreshed_at = 0
        self.objective = DPO(
            model,
            config.objective,
            config.rollout.guidance,
            config.seed,
            config.memory.sequential,
            before_micro_batch=self.stopping.check,
            backward=self.optimizer.backward,
        )
        self.selector = Selector(config, processes)
        self.timer = StageTimer(processes.device, processes.stages)
        self.sampler = self._build_sampler()
        # Stages are timed, and idle parts are sent to the host, around the functions that do the work.
        self._sample = self.timer.timed("rollout", self.sampler.sample)
        self._update_policy = self.timer.timed("update", self._update)
        self._refresh_reference = self.timer.timed("refresh", self._refresh)
        self._backward = self.idle_offload.during("update", self.objective.backward)
        self._optimizer_step = self.idle_offload.during("optimizer", self._average_and_step)

    @property
    def optimizer_steps(self) -> int:
        return self.optimizer.steps

    def step(self, prompts: Sequence[Prompt]) -> Step:
        """Make one step of Algorithm 1 on this team's prompts.

        If the run is asked to stop before weights have changed, raise StepAbandonedError.
        """
        with self.stopping.stoppable(together=self.processes.team.count > 1), self.optimizer.whole():
            if self.stored is None:
                candidates = self._sample(prompts)  # N videos per prompt, decoded and scored
                choices = self._resample_ties(
                    self.selector.choose(candidates)
                )  # winner = argmax, loser = argmin
            else:
                choices = self.stored.choices(prompts, self.model.latent_shape, self.processes.device)
        pairs = self.selector.pairs(choices)  # without ties, weighted
        for update in range(self.config.objective.updates_per_rollout):
            metrics = self._update_policy(pairs, choices[0], update)  # Diffusion-DPO on the latents
            self._refresh_reference()  # every K optimizer steps: reference <- policy
        return self._step_made(choices, pairs, metrics)

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
        keeps step with the others. Right after a refresh the policy is the reference, every
        margin is 0, and there is no implicit accuracy.
        """
        team, here = self.processes.team, self.processes.device
        mine = team.rank_range(len(pairs) * self.config.objective.timesteps_per_pair)
        total = int(self.processes.sum(torch.tensor(len(pairs), device=here))) // team.count
        sums = torch.zeros(len(DPO.METRICS) + 1, dtype=torch.float64, device=here)
        rate = learning_rate(self.config.optimizer, self.optimizer_steps, self.config.optimizer_steps)
        refreshed = self.optimizer_steps == self.refreshed_at
        self.optimizer.begin(rate)
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
            metrics |= {name: value / samples for name, value in zip(DPO.METRICS, totals, strict=True)}
            if refreshed:
                del metrics["implicit_accuracy"]
            if not math.isfinite(metrics["loss"]):
                raise NotFiniteError(f"the loss is {metrics['loss']}")
            metrics["grad_norm"] = self._optimizer_step()
        return metrics

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the policy's network has the weights that are evaluated; see ``EmaConfig``."""
        return nullcontext() if self.average is None else self.average.evaluated()

    def _build_average(self) -> Average | None:
        settings = self.config.ema
        if settings.decay is None:
            return None
        average = self.optimizer.average(settings)
        if not settings.on_host:
            self.idle_offload.register("ema", average.tensors)
        return average

    def _passes_behind(self, samples: int) -> int:
        """Return how many micro-batches fewer this process has than another one."""
        size = self.config.objective.micro_batch_size or max(1, samples)
        passes = -(-samples // size)
        return self.processes.largest(passes) - passes

    def _average_and_step(self) -> float:
        self.optimizer.average_gradients(self.processes)
        norm = self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return norm

    def _refresh(self) -> None:
        """Copy the policy into the reference after every K optimizer steps; steps without an update do not count."""
        every = self.config.reference.refresh_every
        if every and self.optimizer_steps - self.refreshed_at >= every:
            with self.idle_offload.phase("refresh"):
                self.reference.refresh(self.model.network, self.optimizer.gathered)
            self.refreshed_at = self.optimizer_steps

    def _step_made(self, choices: list[Choice], pairs: list[Pair], metrics: dict[str, float]) -> Step:
        seconds, peaks = self.timer.take()
        metrics |= self.selector.metrics(choices)
        if self.average is not None:
            metrics["ema/decay"] = self.average.decay
        metrics |= {
            "optimizer_steps": self.optimizer_steps,
            "reference_age": self.optimizer_steps - self.refreshed_at,
            **{f"reference/{name}": value for name, value in self.reference.numbers().items()},
            **peaks,
        }
        return Step(metrics, choices, pairs, seconds, sum(network.take() for network in self._networks))

    def _refresh_copy(self) -> None:
        if self.copy is not None:
            self.copy.refresh()

    def _build_sampler(self) -> CandidateSampler:
        """Return the sampler of candidates, for which the policy, the reference or an 8-bit copy predicts."""
        config, model, device = self.config.rollout, self.model, self.processes.device
        batches = Batches(config.batch_limit, halved=self.processes.team.couple is None)
        exact: Network = self.reference if config.source == "reference" else model.network
        bits = config.first_pass.weights
        self.copy = None if bits == "policy" else SamplingCopy(model.network, bits)
        first = exact if self.copy is None else self.copy
        check = self.stopping.check
        self._networks = (
            CountedRows(first, check),
            CountedRows(exact if config.weights == "policy" else first, check),
        )
        reward = self.reward if self.config.guards.motion_floor is None else WithMotion(self.reward)
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
            self.timer.timed("reward", scorer),
            self.selector.extremes,
            self.processes.team,
            None if config.preview_frames is None else model.prefix(config.preview_frames)[0],
        )


def embed_prompts(model: VideoModel, texts: Sequence[str], positions: Sequence[int]) -> list[Prompt]:
    """Return the prompts of a step: texts that the model has prepared, with their positions in the stream."""
    embedding = model.embed(texts)
    return [
        Prompt(text, embedding[row : row + 1], position)
        for row, (text, position) in enumerate(zip(texts, positions, strict=True))
    ]


def _check(config: Config, processes: Processes) -> None:
    if config.memory.step_in_backward and processes.count > 1:
        raise ValueError(
            f"memory.step_in_backward=true excludes {processes.count} processes: each would step by its own "
            "gradients, before their mean is known. Run one process, or set it to false"
        )
    if config.rollout.compile == "graphs" and processes.device.type != "cuda":
        raise ValueError(
            f"rollout.compile=graphs needs a CUDA device, but this is {processes.device.type}; set "
            "rollout.compile=none, or blocks"
        )
