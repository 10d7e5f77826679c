"""Models of diffusers' families whose tokens processes divide, against the same models in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_runs import SAMPLED, relative
from step_case import pairs_of
from tiny_pipelines import FOLDERS, disturb, run_config, sized

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.distributed.sequence_traffic import sequence_traffic
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.model_values import SamplerSettings
from vpo_engine.models import diffusers_sequence, gradient_check
from vpo_engine.models.diffusers_network import CompiledBlocks, set_activations
from vpo_engine.objectives.dpo import DPO
from vpo_engine.reference.store import build_reference

PROMPTS = ("a red cat", "two blue dogs run over the hill")
LORA = ("model.lora.rank=4", "model.lora.alpha=8", "reference.storage=adapter")
GRADIENTS = 1e-5
"""Relative differences of whole gradients in float32; one operation rounds to 6e-8, and there are some hundred of them
one after the other."""
WAYS = {
    "full": ((), "none", False),
    "full, sequential, checkpointed": ((), "block", True),
    "full in 8 bits": (("reference.storage=int8",), "all_but_attention", False),
    "adapter, checkpointed": (LORA, "pointwise", False),
    "adapter, sequential": (LORA, "none", True),
}
"""Settings, activation checkpointing, and whether winner and loser go one after the other."""
OF_FAMILIES = {
    "cogvideox": ("full", "adapter, sequential"),
    "wan": tuple(WAYS),
    "ltx": ("full, sequential, checkpointed", "adapter, checkpointed"),
}
"""Families differ in their layers, which every way goes through; the ways themselves are the same code for all."""


def config_of(kind: str, folder: Path, *more: str) -> Config:
    return run_config(kind, folder / kind, folder / "run", *sized(kind), *more)


def loaded(config: Config, processes: Processes) -> Any:
    model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    return model


def step(
    model: Any, reference: Any, config: Config, sequential: bool
) -> tuple[dict[str, float], torch.Tensor]:
    """Return the metrics of the loss of two pairs, and the gradient of all parameters."""
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    winners, losers = (
        torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    model.network.zero_grad()
    objective = DPO(model, config.objective, config.rollout.guidance, config.seed, sequential)
    metrics = objective.backward(pairs_of(winners, losers, model.embed(PROMPTS), [0, 1]), reference)
    return metrics, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def videos(model: Any, blocks: Any, **options: Any) -> torch.Tensor:
    """Return two videos of each prompt; ``blocks``: what computes blocks with rollout.compile=blocks."""
    noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    model._compiled = blocks
    settings = SamplerSettings(3, 3.0, compile="none" if blocks is None else "blocks", **options)
    return model.denoise(model.network, model.start(noise), model.embed(PROMPTS), settings).latents


def check_family(kind: str, folder: Path, processes: Processes) -> None:
    alone, group = Processes(0, 1, processes.device), SequenceGroup(processes.sequence)
    for name in OF_FAMILIES[kind]:
        settings, checkpointing, sequential = WAYS[name]
        config = config_of(kind, folder, *settings)
        models = whole, divided = loaded(config, alone), loaded(config, processes)
        set_activations(divided.network, Activations(checkpointing))  # type: ignore[arg-type]
        references = [build_reference(config.reference.storage, model.network) for model in models]
        for moved in (False, True):
            if moved:
                for model in models:
                    disturb(model.network, 1)
            expected, gradient = step(whole, references[0], config, sequential)
            found, own = step(divided, references[1], config, sequential)
            where = (kind, name, moved)
            assert relative(group.sum(own), gradient) < GRADIENTS, where
            assert relative(own, gradient) > 0.1, (where, "a process has a part of the gradient")
            if not moved and "int8" not in str(settings):
                assert found["margin"] == expected["margin"] == 0.0, where
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-3), where
    whole, divided = loaded(config_of(kind, folder), alone), loaded(config_of(kind, folder), processes)
    compiled = CompiledBlocks(divided.network, divided.device, backend="eager")
    for blocks, options in ((None, {}), (None, {"cache": 10.0}), (compiled, {})):
        found, expected = videos(divided, blocks, **options), videos(whole, None, **options)
        assert relative(found, expected) < SAMPLED, (kind, options)
        everywhere = processes.sequence.gather(found[None])
        assert all(torch.equal(found, other) for other in everywhere), kind
    check_bytes(divided, processes)
    latents = [torch.ones(1, *divided.latent_shape, requires_grad=True) for _ in range(2)]
    for model, given in zip((whole, divided), latents, strict=True):
        model.predict(
            model.network, given, torch.tensor([500.0]), model.embed(PROMPTS[:1])
        ).square().sum().backward()
    assert relative(latents[1].grad, latents[0].grad) < GRADIENTS, kind


def check_bytes(model: Any, processes: Processes) -> None:
    """The bytes that processes send on average are those of the formulas, with and without a second computation."""
    network, group, text = model.network, model.network.sequence, model.embed(PROMPTS[:1])
    _, frames, rows, columns = model.latent_shape
    patch = network.config.patch_size
    tokens = frames * rows * columns // (patch**2 if isinstance(patch, int) else math.prod(patch))
    joint = len(model.facts.tokens.carried) > 1
    for checkpointing in ("none", "block"):
        set_activations(network, Activations(checkpointing))
        expected = sequence_traffic(
            "heads",
            processes=processes.sequence.count,
            blocks=2,
            tokens=tokens + (text.embeddings.shape[1] if joint else 0),
            width=network.config.num_attention_heads * network.config.attention_head_dim,
            element_size=4,
            output_tokens=tokens,
            output_values=network.proj_out.out_features,
            output_size=4,
            recomputed=checkpointing != "none",
        )
        before = group.sent
        prediction = model.predict(network, torch.ones(1, *model.latent_shape), torch.tensor([500.0]), text)
        forward = group.sent - before
        prediction.sum().backward()
        sent = torch.tensor([forward, group.sent - before - forward], dtype=torch.float64)
        sent = processes.sequence.sum(sent) / processes.sequence.count
        assert sent.tolist() == pytest.approx([expected.forward, expected.backward], rel=0.05)


@contextmanager
def without_exchange() -> Iterator[None]:
    """Let attention stay among a process's own tokens, as in a version of diffusers that computes otherwise."""
    right = diffusers_sequence.attend_to_all
    diffusers_sequence.attend_to_all = lambda attend, *tensors: attend(*tensors)
    try:
        yield
    finally:
        diffusers_sequence.attend_to_all = right


def in_two(folder: Path) -> None:
    processes = Processes.start("cpu", sequence=2)
    gradient_check.BOUND = GRADIENTS
    for kind in FOLDERS:
        check_family(kind, folder, processes)
        with (
            without_exchange(),
            pytest.raises(ValueError, match=r"with diffusers [\d.]+ and torch .* get other"),
        ):
            loaded(config_of(kind, folder), processes)
    processes.stop()


def in_four(folder: Path) -> None:
    """The folders have two heads, so four processes are refused; small models have five."""
    processes = Processes.start("cpu", sequence=4)
    gradient_check.BOUND = GRADIENTS
    for kind in FOLDERS:
        alone = Processes(0, 1, processes.device)
        model = loaded(config_of(kind, folder), alone)
        group = SequenceGroup(processes.sequence)
        gradient_check.check_gradients(gradient_check.small_model(model, 5), model.facts.tokens, group)
        with pytest.raises(
            ValueError, match=r"sequence_parallel=4 divides the attention heads .* there are 2; set"
        ):
            model.share_sequence(group)
    processes.stop()
