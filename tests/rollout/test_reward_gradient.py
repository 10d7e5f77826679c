"""Sampling with gradients: the values of sampling without them, the gradients of plain autograd, from any step."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import shipped_policy_is_small
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "models"))

from flow_case import load_model
from flow_folders import PROMPTS, ltx_folder, wan_folder
from tiny_diffusers import cogvideox_pipeline, load, settings

from vpo_engine.config import MemoryConfig
from vpo_engine.data.sprites.assets import load_sprites
from vpo_engine.data.sprites.world import all_captions
from vpo_engine.distributed.processes import Processes
from vpo_engine.model_values import SamplerSettings, SamplerState, TextEmbedding
from vpo_engine.rollout.reward_gradient import (
    clean_prediction,
    denoise_with_gradients,
    first_below_noise,
)

FAMILIES = ("sprites", "cogvideox", "wan", "ltx")
STEPS = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("folders")
    cogvideox_pipeline().save_pretrained(root / "cogvideox")
    with shipped_policy_is_small():
        sprites = load_sprites(Processes.start("cpu"), torch.float32)
    found = {
        "sprites": sprites,
        "cogvideox": load(settings(root / "cogvideox")),
        "wan": load_model("wan", wan_folder(root / "wan")),
        "ltx": load_model("ltx", ltx_folder(root / "ltx")),
    }
    for family, model in found.items():
        model.prepare(prompts_of(family))
    return found


def prompts_of(family: str) -> list[str]:
    return all_captions()[:2] if family == "sprites" else PROMPTS


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, models: dict[str, Any]) -> tuple[Any, TextEmbedding, Tensor]:
    """A model, the text of two prompts, and noise."""
    model = models[request.param]
    model.network.zero_grad()
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(6))
    return model, model.embed(prompts_of(request.param)), noise


def plain(
    model: Any, state: SamplerState, text: TextEmbedding, guidance: float, stop: int = STEPS
) -> tuple[Tensor, Tensor]:
    """The latents after ``stop`` steps and the last preview, without checkpoints, in ten lines of their own."""
    solver = model.solver(STEPS)
    latents, preview, memory = state.latents, state.preview, state.memory
    for step in range(state.step, stop):
        time = torch.full((len(latents),), solver.times[step])
        prediction = model.predict(model.network, latents, time, text, guidance)
        after, memory = solver.advance(step, latents, prediction, memory)
        latents, preview = after, solver.preview(step, latents, after, prediction)
    return latents, preview


def gradients(model: Any, value: Tensor) -> list[Tensor]:
    """The gradients of a value's sum for all parameters that it depends on."""
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    return [
        found
        for found in torch.autograd.grad(value.sum(), parameters, allow_unused=True)
        if found is not None
    ]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    """Recomputation may sum in another order: float32 rounding of the norm, ten times over."""
    assert len(found) == len(expected) > 0
    difference = sum(float((one - other).square().sum()) for one, other in zip(found, expected, strict=True))
    assert math.sqrt(difference) <= 1e-5 * math.sqrt(sum(float(one.square().sum()) for one in expected))


@pytest.mark.parametrize("first", [0, 2, 4])
def test_values_are_those_of_sampling_without_gradients(case: Any, first: int) -> None:
    model, text, noise = case
    sampling = SamplerSettings(STEPS, 3.0)
    state = model.denoise(model.network, model.start(noise), text, sampling, first)
    found = denoise_with_gradients(model, model.network, state, text, sampling)
    expected = model.denoise(model.network, state, text, sampling)
    assert found.step == expected.step == STEPS
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.preview, expected.preview, rtol=1e-5, atol=1e-5)
    assert found.latents.requires_grad


@pytest.mark.parametrize("last_steps", [1, 3])
def test_gradients_are_those_of_the_steps_without_checkpoints(case: Any, last_steps: int) -> None:
    """Everything before the last K steps is a constant, and everything within them is not."""
    model, text, noise = case
    sampling = SamplerSettings(STEPS, 3.0)
    state = model.denoise(model.network, model.start(noise), text, sampling, STEPS - last_steps)
    found = gradients(model, denoise_with_gradients(model, model.network, state, text, sampling).latents)
    assert_alike(found, gradients(model, plain(model, state, text, 3.0)[0]))


def test_more_steps_have_other_gradients(case: Any) -> None:
    model, text, noise = case
    sampling = SamplerSettings(STEPS, 3.0)
    found = []
    for last_steps in (1, 2):
        state = model.denoise(model.network, model.start(noise), text, sampling, STEPS - last_steps)
        latents = denoise_with_gradients(model, model.network, state, text, sampling).latents
        found.append(torch.cat([each.flatten() for each in gradients(model, latents)]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) > 1e-2


def test_a_clean_prediction_is_the_preview_of_one_step(case: Any) -> None:
    model, text, noise = case
    sampling = SamplerSettings(STEPS, 3.0)
    state = model.denoise(model.network, model.start(noise), text, sampling, 3)
    found = clean_prediction(model, model.network, state, text, sampling)
    expected = plain(model, state, text, 3.0, stop=4)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_alike(gradients(model, found), gradients(model, expected))


def test_guidance_has_its_interval(models: dict[str, Any]) -> None:
    model, text = models["sprites"], models["sprites"].embed(prompts_of("sprites"))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(6))
    state = model.denoise(model.network, model.start(noise), text, SamplerSettings(STEPS, 3.0), 4)
    out = SamplerSettings(STEPS, 3.0, guidance_interval=(0.999, 1.0))
    found = denoise_with_gradients(model, model.network, state, text, out).latents
    torch.testing.assert_close(found, plain(model, state, text, 1.0)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["pointwise", "all_but_attention", "block"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_blocks_may_be_checkpointed_inside_of_checkpointed_steps(
    models: dict[str, Any], checkpointing: str, chunks: int
) -> None:
    model, text = models["sprites"], models["sprites"].embed(prompts_of("sprites"))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(6))
    sampling = SamplerSettings(STEPS, 3.0)
    state = model.denoise(model.network, model.start(noise), text, sampling, 3)
    expected = gradients(model, plain(model, state, text, 3.0)[0])
    inner = MemoryConfig.model_validate({"activation_checkpointing": checkpointing, "mlp_chunks": chunks})
    model.use_memory(inner)
    try:
        found = gradients(model, denoise_with_gradients(model, model.network, state, text, sampling).latents)
    finally:
        model.use_memory(MemoryConfig())
    assert_alike(found, expected)


def test_the_graph_of_many_steps_keeps_what_enters_them_and_no_activations(models: dict[str, Any]) -> None:
    model, text = models["sprites"], models["sprites"].embed(prompts_of("sprites"))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(6))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = denoise_with_gradients(
            model, model.network, model.start(noise), text, SamplerSettings(STEPS, 3.0)
        )
    assert found.latents.requires_grad
    assert (
        sum(kept.values()) <= 2 * STEPS * noise.numel() * 4
    )  # the latents of each step, and a prediction at most


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_partial_chain_begins_at_the_noise_of_its_step(case: Any, step: int) -> None:
    """Latents are noised to exactly the level that a whole chain has there, and the rest of the chain is the same."""
    model, text, noise = case
    clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(8))
    state = model.start_from(clean, noise, STEPS, step)
    level = model.solver(STEPS).noise_level(step)
    added = (model.start_from(clean, noise + 1, STEPS, step).latents - state.latents).mean()
    assert added.item() == pytest.approx(min(level, 1.0), abs=1e-5)
    assert (state.step, state.memory) == (step, ())
    sampling = SamplerSettings(STEPS, 1.0)
    found = denoise_with_gradients(model, model.network, state, text, sampling).latents
    torch.testing.assert_close(found, plain(model, state, text, 1.0)[0], rtol=1e-5, atol=1e-5)
    expected = model.denoise(model.network, state, text, sampling).latents
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_first_step_below_a_noise_level(case: Any) -> None:
    model = case[0]
    solver = model.solver(STEPS)
    for step in range(1, STEPS):
        assert first_below_noise(model, solver.noise_level(step), STEPS) == step
    assert first_below_noise(model, 0.0, STEPS) == STEPS - 1
    assert first_below_noise(model, 2.0, STEPS) == 0
