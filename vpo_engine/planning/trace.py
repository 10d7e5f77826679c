"""Trace one step of Algorithm 1 with fake tensors: its phases, with what they allocate and compute.

The objects are the engine's own: network, objective, optimizer, reference, sampler and VAE; only weights and values
are missing. Tensors are on the CPU of FakeTensorMode, so a plan is the same on every machine. Where a GPU is planned
for, ``gpu_rules`` adds the rules of its autocast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpo_engine.config import Config
from vpo_engine.distributed.sequence import planned
from vpo_engine.memory.batches import Batch
from vpo_engine.memory.ema import PolicyAverage
from vpo_engine.memory.offload import OffloadedInputs
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.models.policy import prepare_policy
from vpo_engine.objectives.dpo import DPO
from vpo_engine.planning.gpu_rules import as_on_gpu
from vpo_engine.planning.parts import (
    Assumed,
    bare_weights,
    blueprint_of,
    build_reward_network,
    materialise,
    materialise_model,
    release,
)
from vpo_engine.planning.repeats import repeated, repeated_steps
from vpo_engine.planning.reward_gradient import LeftOutSampling, planned_method
from vpo_engine.planning.stand_ins import FirstHalf, HostCopies, pair_without_values, without_collections
from vpo_engine.planning.tracker import Peak, Phase, Tracker
from vpo_engine.planning.videoscore import PlannedVideoScore
from vpo_engine.protocols import SamplerSettings, SamplerState, TextEmbedding, at_hand
from vpo_engine.reference.store import HeldReference, build_reference
from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rollout.quantised_copy import SamplingCopy
from vpo_engine.values import Prompt
from vpo_engine.video_model import repeating_blocks

PhaseName = Literal["text", "rollout", "decode", "reward", "update", "optimizer", "refresh"]
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)

TEXT_BATCH = 16
"""Prompts that the text encoder takes at once (vpo_engine/data/text_source.py)."""


@dataclass
class Trace:
    """A traced step.

    phases: what was traced of each, in parts, with how often a step does that: a fraction for what not every step
    does, once for the text, a batch of which is encoded before the first. notes: what was assumed. depth: of the
    network as configured.
    """

    tracker: Tracker
    phases: dict[PhaseName, list[tuple[Phase, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    depth: int = 0

    @property
    def names(self) -> tuple[PhaseName, ...]:
        return tuple(self.phases)

    def peak(self, name: PhaseName, absent: frozenset[str] = frozenset()) -> Peak:
        """Return the bytes by category at a phase's peak, without the categories ``absent``."""
        peaks = [self.tracker.peak(part, absent) for part, _ in self.phases[name]]
        return max(peaks, key=lambda peak: sum(peak.values()))

    def host(self, name: PhaseName) -> int:
        """Return the most bytes that the host holds for the device in a phase."""
        return max(self.tracker.peak_of(part, "host") for part, _ in self.phases[name])

    def flops(self, name: PhaseName) -> float:
        """Return the operations of a phase in one step."""
        return sum(part.flops * times for part, times in self.phases[name])

    def traffic(self, name: PhaseName) -> float:
        """Return the bytes that a phase reads and writes in one step."""
        return sum(part.traffic * times for part, times in self.phases[name])


def trace_step(
    config: Config, *, on_gpu: bool, processes: int = 1, depth: int | None = None, network_only: bool = False
) -> Trace:
    """Trace one process's part in a step.

    depth: of the network, other than configured. network_only: without text, decode and reward.
    """
    return _Tracing(config, on_gpu, processes, depth).run(network_only)


class _Tracing:
    """Builds the parts of a fake step and runs its phases."""

    def __init__(self, config: Config, on_gpu: bool, processes: int, depth: int | None) -> None:
        self._config, self._on_gpu = config, on_gpu
        team, sequence = config.processes.per_prompt, config.distributed.sequence_parallel
        whole = processes % (team * sequence) == 0
        self._team, self._sequence, self._sharers = (
            (team, sequence, config.processes.sharers) if whole else (1, 1, 1)
        )
        self._pairs = max(1, config.pairs_per_step * self._team * self._sequence // processes)
        assumed = Assumed()
        blueprint = blueprint_of(config, assumed, depth)
        self._model = blueprint.model
        if config.model.lora is not None:
            prepare_policy(self._model.network, config, self._model.card, self._model.dtype)
        if self._sequence > 1:
            self._model.share_sequence(planned(self._sequence))
        network = build_reward_network(config, assumed)
        self._reward = None if network is None else PlannedVideoScore(network, config.reward)
        self._bare = bare_weights(config, assumed)
        self._text_encoder = None if blueprint.text_encoder is None else blueprint.text_encoder()
        self._tracker = Tracker(scratch=on_gpu)
        self._trace = Trace(self._tracker, notes=assumed.notes, depth=blueprint.depth)

    def run(self, network_only: bool) -> Trace:
        with (
            without_collections(),
            FakeTensorMode(allow_non_fake_inputs=True),
            as_on_gpu(self._on_gpu),
            self._tracker,
            repeated_steps(self._tracker),
        ):
            self._build()
            networks = [self._model.network, *([self._reference.network] if self._reference else [])]
            with repeated(self._tracker, networks, *self._groups(networks)):
                if not network_only:
                    self._text()
                latents, text = self._candidates()
                if self._config.card.candidates:
                    self._rollout(latents, text)
                    if not network_only:
                        self._score(latents)
                if self._method is None:
                    self._update(latents, text)
                else:
                    self._follow_gradient(self._method, text)
        return self._trace

    def _groups(self, networks: Iterable[nn.Module]) -> list[Iterable[nn.Module]]:
        """Return groups of modules that do the same again and again."""
        groups: list[Iterable[nn.Module]] = [[part] for part in self._model.decoders]
        for network in (*networks, *([] if self._text_encoder is None else [self._text_encoder])):
            groups += repeating_blocks(network).values()
        if self._reward is not None:
            trunk = self._reward.network.model
            groups += [trunk.vision_model.encoder.layers, trunk.text_model.layers]
        return groups

    @contextmanager
    def _phase(self, name: PhaseName, times: float) -> Iterator[None]:
        with self._tracker.making("activations"), self._tracker.phase() as phase:
            yield
        self._trace.phases.setdefault(name, []).append((phase, times))

    # --- parts ---------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Make policy, VAE, reward model, reference, and the optimizer with its state after the first step."""
        config, tracker, network = self._config, self._tracker, self._model.network
        materialise_model(self._model, tracker)
        if config.model.lora is None:
            hold_in_bfloat16(
                network, config.memory.weights, self._model.dtype, self._model.card.float32_modules
            )
        tracker.label([*network.parameters(), *network.buffers()], "weights")
        if "memory.offload_activations" in self._model.card.supports:
            copies = OffloadedInputs(lambda tensor: HostCopies(tensor.device, tracker))
            network.offloaded = copies  # type: ignore[assignment]
        if self._reward is not None:
            self._reward.build(tracker, self._on_gpu)
        self._held = []
        for part, size in self._bare.items():
            with tracker.making(part):
                self._held.append(torch.zeros(size, dtype=torch.uint8))
        self._reference: HeldReference | None = None
        if config.card.reference:
            with tracker.making("reference"):
                self._reference = build_reference(config.reference.storage, network)
        bits = config.rollout.first_pass.weights
        if bits != "policy":
            with tracker.making("sampling copy"):
                self._copy = SamplingCopy(network, bits)
        trained = [p for p in network.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        self._method = None
        if config.card.reward_gradient:
            score = None if self._reward is None else partial(self._reward.score_frames, tracker)
            self._method = planned_method(config, self._model, score, self._reference)
        self._optimizer = self._build_optimizer(trained)
        with tracker.making("optimizer"):
            self._optimizer.begin(config.optimizer.lr)
            zeros = [torch.zeros_like(parameter) for parameter in trained]
            if config.memory.step_in_backward:
                torch.autograd.backward(trained, zeros)
            else:
                for parameter, zero in zip(trained, zeros, strict=True):
                    parameter.grad = zero
            del zeros
            self._optimizer.step()
        tracker.label(self._optimizer.state_dict().values(), "optimizer")
        self._average = self._build_average(trained)
        self._trained = trained

    def _build_optimizer(self, trained: list[nn.Parameter]) -> PolicyOptimizer:
        if self._method is not None:
            assert isinstance(self._method.optimizer, PolicyOptimizer)
            return self._method.optimizer
        config = self._config
        preserve = at_hand if self._reference is None else self._reference.preserve
        return PolicyOptimizer(
            trained, config.optimizer, config.optimizer_memory, seed=config.seed, preserve_reference=preserve
        )

    def _build_average(self, trained: list[nn.Parameter]) -> PolicyAverage | None:
        settings = self._config.ema
        if settings.decay is None:
            return None
        if settings.on_host and self._on_gpu:
            size = sum(parameter.numel() for parameter in trained) * 4 / 2**30
            self._trace.notes.append(f"the moving average takes {size:.2f} GiB of host memory (ema.on_host)")
            return None
        with self._tracker.making("ema"):
            return PolicyAverage(trained, self._optimizer.precise_weights, settings)

    def _label_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._tracker.label([parameter.grad], "gradients")

    def _candidates(self) -> tuple[Tensor, TextEmbedding]:
        """Return the latents of a step's candidates, and the text of its prompts, all of the greatest length."""
        text, latent = self._model.text_rule, self._model.latent_shape
        with self._tracker.making("other"):
            latents = torch.zeros(self._pairs * self._config.rollout.candidates, *latent)
            size = (self._pairs, text.max_tokens, text.channels)
            embeddings = torch.zeros(*size, dtype=self._model.dtype)
        return latents, TextEmbedding(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool))

    # --- phases --------------------------------------------------------------------------------------------

    def _text(self) -> None:
        encoder = self._text_encoder
        if encoder is None:
            return
        with self._phase("text", 1.0), torch.no_grad():
            with self._tracker.making("text encoder"):
                materialise(encoder, self._model.dtype)
            ids = torch.zeros(TEXT_BATCH, self._model.text_rule.max_tokens, dtype=torch.int64)
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
            release(encoder)

    def _rollout(self, latents: Tensor, text: TextEmbedding) -> None:
        """Send one group of candidates through the sampling loop; with rollout.prune in two parts, with explore twice.

        A rounded copy is planned like the policy, except for the memory it holds. The step cache is planned as if it
        never applied, because nobody knows beforehand how often it will.
        """
        config = self._config.rollout
        network = self._reference if config.source == "reference" else self._model.network
        assert network is not None
        first, explored = config.first_pass, config.explore is not None
        split = FirstHalf() if self._sharers < self._team else None
        settings = SamplerSettings(
            config.steps, config.guidance, config.guidance_interval, config.cache, split=split
        )
        cheap = SamplerSettings(
            first.steps or config.steps, config.guidance, first.guidance_interval, first.cache, split=split
        )
        parts = [(cheap, 0, None if explored else config.prune_step, config.candidates)]
        if config.keep is not None:
            parts.append((settings, 0 if explored else config.prune_step or 0, None, config.keep))
        self._tracker.answer = lambda: 0.0
        for settings, first_step, stop, candidates in parts:
            everything = Batch(range(self._pairs), range(candidates // self._sharers))
            group = everything.split(config.batch_limit)[0]
            row_text = text[group.index[0]]
            state = self._reached(latents[: len(group)], settings.steps, first_step)
            with self._phase("rollout", len(everything) / len(group)):
                self._model.denoise(network, state, row_text, settings, stop)
        self._tracker.answer = lambda: 1.0

    def _reached(self, noise: Tensor, steps: int, done: int) -> SamplerState:
        """Return the state after the first ``done`` steps, with what the solver remembers of them."""
        solver, memory = self._model.solver(steps), tuple[Tensor, ...]()
        with self._tracker.making("other"):
            for step in range(done):
                _, memory = solver.advance(step, noise, noise, memory)
        return SamplerState(noise, noise, done, memory)

    def _score(self, latents: Tensor) -> None:
        """Decode and score one group. With rollout.prune.frames the reward's time is that of whole videos even so."""
        rollout = self._config.rollout
        sharers = self._sharers * self._sequence
        mine = -(-len(latents) // sharers)
        rows = min(rollout.batch_limit or mine, mine)
        finished = -(-self._pairs * (rollout.keep or 0) // sharers)
        scored, whole = mine + finished, mine + finished
        if rollout.preview_frames is not None:
            whole, (length, _) = finished, self._model.prefix(rollout.preview_frames)
            with self._phase("decode", mine / rows):
                self._model.decode(latents[:rows, :, :length])
        with self._phase("decode", whole / rows):
            video = self._model.decode(latents[:rows])
        if self._reward is None:
            if "reward" in self._bare:
                with self._phase("reward", 0.0):
                    pass
            return
        at_once = min(self._config.reward.batch_size or 4, rows)
        with self._phase("reward", scored / at_once), torch.no_grad():
            self._reward.read(self._tracker, self._reward.processed(at_once, *video.shape[1:4]))

    def _follow_gradient(self, method: RewardGradientMethod, text: TextEmbedding) -> None:
        """Make the step of a method that follows the reward's gradient, one micro-batch of it.

        What it samples without gradients is a phase of its own.
        """
        rows = min(self._config.objective.micro_batch_size or self._pairs, self._pairs)
        prompts = [Prompt("", text[row : row + 1], row) for row in range(rows)]
        method._sample = sampling = LeftOutSampling()
        self._optimizer.begin(self._config.optimizer.lr)
        self._hold_gradients(rows < self._pairs)
        with self._phase("update", self._pairs / rows):
            method._add_gradients(prompts)
        for state, of_prompts, stop in sampling.parts:
            self._tracker.answer = lambda: 0.0
            with self._phase("rollout", self._pairs / rows):
                self._model.denoise(self._model.network, state, of_prompts, method.sampling, stop)
            self._tracker.answer = lambda: 1.0
        self._step(1)

    def _hold_gradients(self, earlier: bool) -> None:
        """Hold gradients of ``earlier`` micro-batches, to which the one that counts adds."""
        for parameter in self._trained if earlier else ():
            parameter.grad = torch.zeros_like(parameter)
            self._label_gradient(parameter)

    def _step(self, updates: int) -> None:
        with self._phase("optimizer", updates):
            self._optimizer.step()
            if self._average is not None:
                self._average.update()

    def _update(self, latents: Tensor, text: TextEmbedding) -> None:
        config, draws = self._config, self._config.objective.timesteps_per_pair
        total = -(-self._pairs * draws // self._team)
        rows = min(config.objective.micro_batch_size or total, total)
        objective = DPO(
            self._model,
            config.objective.model_copy(update={"timesteps_per_pair": 1, "micro_batch_size": None}),
            config.rollout.guidance,
            config.seed,
            config.memory.sequential,
            sampled_from=lambda candidate: candidate.latents,
        )
        self._optimizer.begin(config.optimizer.lr)
        self._hold_gradients(rows < total)
        pairs = [
            pair_without_values(latents[row // draws], text[row // draws : row // draws + 1], row)
            for row in range(rows)
        ]
        assert self._reference is not None
        updates = config.objective.updates_per_rollout
        with self._phase("update", updates * total / rows):
            objective.backward(pairs, self._reference)
        self._step(updates)
        every = config.refresh_every
        with self._phase("refresh", updates / every if every else 0.0):
            self._reference.refresh(self._model.network)
