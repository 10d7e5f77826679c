"""The data that a configured run exchanges in a step, for ``distributed/traffic.py``; no weights are needed."""

from __future__ import annotations

import math

import torch

from vpo_engine.config import Config
from vpo_engine.distributed.deepspeed_settings import resolve
from vpo_engine.distributed.traffic import Division, Exchanged
from vpo_engine.models.policy import prepare_policy
from vpo_engine.planning.parts import Assumed, blueprint_of
from vpo_engine.planning.sequence_bytes import sequence_bytes
from vpo_engine.protocols import SamplerSettings
from vpo_engine.rewards.registry import reward_card
from vpo_engine.video_model import VideoModel, repeating_blocks

PERSISTENT = 100_000
"""Elements below which stage 3 keeps a parameter whole: DeepSpeed's default of stage3_param_persistence_threshold."""


def exchanged(config: Config) -> Exchanged:
    """Return the sizes of what a step exchanges. Raise ValueError for a family that cannot be planned."""
    model = blueprint_of(config, Assumed()).model
    if config.model.lora is not None:
        prepare_policy(model.network, config, model.card, model.dtype)
    trained = {id(p): p.numel() for p in model.network.parameters() if p.requires_grad}
    blocks = repeating_blocks(model.network).values()
    in_blocks = {id(p) for block in blocks for p in block.parameters() if p.requires_grad}
    again = config.memory.activation_checkpointing != "none"
    weights = config.optimizer_memory.weights
    rollout, updates = config.rollout, config.objective.updates_per_rollout
    every = config.refresh_every if config.card.reference else None
    samples = config.card.candidates and not config.samples_before
    smallest = _persistent(config)
    guided, predicted = _predictions(config, model) if samples else (0, 0)
    forward, backward = sequence_bytes(config) if config.distributed.sequence_parallel > 1 else (0.0, 0.0)
    return Exchanged(
        trained=sum(trained.values()),
        weight_bytes=4 if weights == "float32" else 2,
        whole=sum(numel for numel in trained.values() if numel < smallest),
        recomputed=sum(trained[key] for key in in_blocks) / sum(trained.values()) if again else 0.0,
        states=2 + (weights == "fp32_master") + (config.ema.decay is not None),
        updates=updates,
        refreshes=updates / every if every else 0.0,
        sequential=config.memory.sequential,
        latents=4 * math.prod(model.latent_shape),
        video=3 * math.prod(model.video_size or (0,)),
        tensors=2 + _memory(model, rollout.steps),
        scores=4 * len(reward_card(config.reward.kind).dimensions),
        sampled=rollout.candidates + (rollout.keep or 0) if samples else 0,
        guided=guided,
        predicted=predicted,
        forward=forward,
        backward=backward,
    )


def division(config: Config, processes: int) -> Division:
    """Return how the work of a step is divided among the processes that train."""
    team, draws = config.processes.per_prompt, config.objective.timesteps_per_pair
    sequence = config.distributed.sequence_parallel
    prompts = max(1, config.pairs_per_step * team * sequence // processes)
    samples = -(-prompts * draws // team)
    deepspeed = config.distributed.engine == "deepspeed"
    return Division(
        ranks=processes,
        stage=resolve(config, processes)["zero_optimization"]["stage"] if deepspeed else None,
        team=team,
        split=config.processes.split_guidance,
        sequence=sequence,
        prompts=prompts,
        samples=samples,
        micro_batches=-(-samples // (config.objective.micro_batch_size or samples)),
        reward=config.processes.reward,
    )


def _persistent(config: Config) -> int:
    if config.distributed.engine != "deepspeed":
        return PERSISTENT
    given = resolve(config, 1)["zero_optimization"]
    return int(given.get("stage3_param_persistence_threshold", PERSISTENT))


def _memory(model: VideoModel, steps: int) -> int:
    """Return how many tensors a solver remembers after its last step."""
    solver, memory, latents = model.solver(steps), tuple[torch.Tensor, ...](), torch.zeros(1)
    for step in range(steps):
        latents, memory = solver.advance(step, latents, latents, memory)
    return len(memory)


def _predictions(config: Config, model: VideoModel) -> tuple[int, int]:
    """Return how many guided predictions the candidates of a prompt take, in all passes of sampling, and how many
    predictions, of which a guided one has two."""
    rollout, first = config.rollout, config.rollout.first_pass
    cheap = SamplerSettings(first.steps or rollout.steps, rollout.guidance, first.guidance_interval)
    exact = SamplerSettings(rollout.steps, rollout.guidance, rollout.guidance_interval)
    stop = cheap.steps if rollout.prune is None else rollout.prune_step
    passes = [(cheap, 0, stop, rollout.candidates)]
    if rollout.keep is not None:
        start = rollout.prune_step if rollout.prune is not None else 0
        passes.append((exact, start, exact.steps, rollout.keep))
    guided = sum(
        candidates * settings.guided_at(model.solver(settings.steps).noise_level(step))
        for settings, start, stop, candidates in passes
        for step in range(start, stop)
        if settings.guidance != 1.0
    )
    return guided, guided + sum(candidates * (stop - start) for _, start, stop, candidates in passes)
