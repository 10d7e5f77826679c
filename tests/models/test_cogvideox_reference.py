"""CogVideoX against recordings of diffusers at a tiny size, and against the published keys (tests/data/cogvideox)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpo_engine.config import ModelConfig
from vpo_engine.metrics.throughput import count_row_flops
from vpo_engine.models.cogvideox import published
from vpo_engine.models.cogvideox.model import CogVideoX
from vpo_engine.models.cogvideox.schedule import Schedule
from vpo_engine.models.diffusers_facts import Setup
from vpo_engine.models.diffusers_folder import build_part, completed
from vpo_engine.models.diffusers_text import NoText
from vpo_engine.protocols import TextEmbedding

DATA = Path(__file__).parents[1] / "data" / "cogvideox"
TRANSFORMER = json.loads((DATA / "transformer_tiny.json").read_text())
VAE = json.loads((DATA / "vae_tiny.json").read_text())
SCHEDULER = json.loads((DATA / "scheduler.json").read_text())
T5 = {"d_model": 32}


def built(name: str, config: dict[str, Any], weights: str) -> nn.Module:
    module = build_part(name, completed(name, "a file", config))
    module.load_state_dict(load_file(DATA / weights), strict=True, assign=True)
    return module


def model_of(frames: int, height: int, width: int) -> CogVideoX:
    """The recorded networks as a model of videos of this size."""
    facts = CogVideoX.facts
    setup = Setup(
        completed(facts.transformer, "a file", TRANSFORMER["config"]),
        completed(facts.vae, "a file", VAE["config"]),
        SCHEDULER["config"],
        height=height,
        width=width,
        num_frames=frames,
        fps=8,
        negative_prompt="",
        text_encoder=T5,
    )
    network = build_part(facts.transformer, setup.transformer, **CogVideoX.built_with(setup))
    network.load_state_dict(load_file(DATA / "transformer_tiny_weights.safetensors"), assign=True)
    vae = built(facts.vae, VAE["config"], "vae_tiny_weights.safetensors")
    return CogVideoX(network, vae, NoText(10, 32), setup, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(DATA / "transformer_tiny_inputs.safetensors")


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(DATA / "transformer_tiny_outputs.safetensors")


def prediction(model: CogVideoX, inputs: dict[str, Tensor], case: str) -> Tensor:
    """Return the model's prediction for a recorded input, in the transformer's layout [B, T, C, H, W]."""
    text = inputs[f"{case}.encoder_hidden_states"]
    embedding = TextEmbedding(text, torch.ones(text.shape[:2], dtype=torch.bool))
    latents = inputs[f"{case}.hidden_states"].transpose(1, 2)
    times = inputs[f"{case}.timestep"].float()
    return model.predict(model.network, latents, times, embedding).transpose(1, 2)


@pytest.mark.parametrize("case", sorted(TRANSFORMER["cases"]))
def test_predictions_are_the_recorded_ones_at_every_size(
    case: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    """The table of positions is that of the size the model was built for, or is computed for another one."""
    frames, _, rows, columns = inputs[f"{case}.hidden_states"].shape[1:]
    for model in (model_of(4 * frames - 3, 8 * rows, 8 * columns), model_of(9, 32, 32)):
        found = prediction(model, inputs, case)
        assert (found - outputs[f"{case}.out"]).abs().max() < 1e-5


def test_gradients_are_the_recorded_ones(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    model = model_of(9, 64, 96)
    loss = (prediction(model, inputs, "default") - inputs["default.grad_target"]).square().mean()
    assert float(loss.detach()) == pytest.approx(TRANSFORMER["grad"]["loss"], rel=1e-6)
    loss.backward()
    checked = 0
    for name, parameter in model.network.named_parameters():
        expected = outputs.get(f"default.grad.{name}")
        if expected is None:
            continue
        checked += 1
        if name.endswith("norm_k.bias"):  # zero but for rounding: it shifts all scores of a query alike
            assert parameter.grad.norm() < 1e-7
            continue
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name
    assert checked


def test_a_bfloat16_network_predicts_the_recorded_values(
    inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    model = model_of(9, 64, 96)
    model.network.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    found, expected = prediction(model, inputs, "default"), outputs["default.out_bf16"].float()
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_the_recorded_sampling_loop_comes_out(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    recorded = TRANSFORMER["sample"]
    model = model_of(9, 48, 64)
    texts = [inputs[f"sample.{name}"] for name in ("prompt_embeds", "negative_prompt_embeds")]
    text, null = (TextEmbedding(one, torch.ones(one.shape[:2], dtype=torch.bool)) for one in texts)
    model.null_text = lambda text: null.repeat_interleave(len(text))  # type: ignore[method-assign]
    noise = inputs["sample.z0"].transpose(1, 2)
    found = model.sample(model.network, noise, text, steps=recorded["steps"], guidance=recorded["cfg"])
    assert (found.transpose(1, 2) - outputs["sample.out"]).abs().max() < 5e-4


@pytest.mark.parametrize("case", sorted(VAE["cases"]))
def test_the_vae_encodes_and_decodes_as_recorded(case: str) -> None:
    given, expected = (load_file(DATA / f"vae_tiny_{name}.safetensors") for name in ("inputs", "outputs"))
    frames, height, width = given[f"{case}.x"].shape[2:]
    model = model_of(frames, height, width)
    with torch.no_grad():
        posterior = model.vae.encode(given[f"{case}.x"]).latent_dist
        assert (posterior.mean - expected[f"{case}.mean"]).abs().max() < 1e-5
        assert (posterior.logvar - expected[f"{case}.logvar"]).abs().max() < 1e-5
        decoded = expected[f"{case}.decoded"]
        latents = posterior.mean * VAE["scaling_factor"]
        assert (model.pixels(model.denormalised(latents)) - decoded).abs().max() < 1e-5
    video = model.decode(latents)
    assert video.dtype == torch.uint8
    expected_pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1)
    assert (video.float() - expected_pixels).abs().max() < 0.5 + 1e-2


# --- the schedule ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(DATA / "scheduler.safetensors")


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule(SCHEDULER["config"])


def test_noising_and_targets_are_the_recorded_ones(schedule: Schedule, recorded: dict[str, Tensor]) -> None:
    assert (schedule.abar - recorded["alphas_cumprod_f64"]).abs().max() < 1e-12
    assert float(schedule.abar[-1]) == 0.0
    model = model_of(9, 32, 48)
    times = recorded["t"].float()
    assert 999.0 in times
    x0, noise = recorded["x0"], recorded["noise"]
    kept, added = (scale.view(-1, 1, 1, 1, 1) for scale in model.target_scales(times))
    assert (model.add_noise(x0, noise, times) - recorded["x_t"]).abs().max() < 1e-6
    assert (kept * x0 + added * noise - recorded["v_target"]).abs().max() < 1e-6


def test_times_are_drawn_from_all_thousand(schedule: Schedule) -> None:
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(schedule.draw(u), torch.arange(1000.0))
    ends = schedule.draw(torch.tensor([[1e-6, 1 - 1e-7]]))
    assert torch.equal(ends, torch.tensor([[0.0, 999.0]]))


@pytest.mark.parametrize("steps", [10, 30, 50])
def test_times_of_sampling_are_the_recorded_ones(schedule: Schedule, steps: int) -> None:
    assert list(schedule.solver(steps).times) == SCHEDULER["timesteps"][str(steps)]


@pytest.mark.parametrize("name", ["const", "tdep"])
def test_ddim_takes_the_recorded_way(schedule: Schedule, recorded: dict[str, Tensor], name: str) -> None:
    loop = SCHEDULER["loops"][name]
    solver = schedule.solver(loop["steps"])
    x: Tensor = recorded[f"{name}.z0"]
    assert solver.noise_level(0) == 1.0
    for step, time in enumerate(solver.times):
        assert (x - recorded[f"{name}.trajectory"][step]).abs().max() < 5e-4
        null = loop["a_uncond"] * x
        prompted = loop["a_cond"] * x + loop["tcoef"] * time / 1000
        v = null + loop["cfg"] * (prompted - null)
        before = x
        x, memory = solver.advance(step, x, v, ())
        assert memory == ()
    assert (x - recorded[f"{name}.out"]).abs().max() < 5e-4
    last = solver.preview(loop["steps"] - 1, before, x, v)
    assert (last - x).abs().max() < 1e-6


def test_a_schedule_of_another_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is epsilon, and CogVideoX-2B's is v_prediction"):
        Schedule({**SCHEDULER["config"], "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match=r"1001 sampling steps .* set rollout\.steps to 1000 or less"):
        Schedule(SCHEDULER["config"]).solver(1001)


# --- the published model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "config"), [("transformer", published.TRANSFORMER), ("vae", published.VAE)])
def test_the_published_keys_shapes_and_parameters(part: str, config: dict[str, Any]) -> None:
    saved = json.loads((DATA / f"cogvideox_2b_{part}_config.json").read_text())
    assert {name: value for name, value in saved.items() if not name.startswith("_")} == config
    name = getattr(CogVideoX.facts, part)
    with torch.device("meta"):
        module = build_part(name, completed(name, "a file", config))
    keys = json.loads((DATA / f"cogvideox_2b_{part}_keys.json").read_text())
    shapes = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    assert shapes == {key: shape for key, (shape, _) in keys.items()}
    counts = json.loads((DATA / "param_counts.json").read_text())[part]
    assert sum(parameter.numel() for parameter in module.parameters()) == counts["parameters"]
    assert all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize(("size", "key"), [((240, 432, 33), "240p/33f (240x432)")])
def test_a_prediction_of_the_published_model_costs_what_was_recorded(
    size: tuple[int, int, int], key: str
) -> None:
    """The engine counts operations on tensors without values; the time embedding of one row is all that it rounds."""
    height, width, frames = size
    settings = ModelConfig(
        kind="cogvideox", policy=Path("absent"), height=height, width=width, num_frames=frames
    )
    blueprint = CogVideoX.blueprint(settings, lambda folder, published, name: dict(published))
    assert blueprint.depth == 30
    blueprint.model.device = torch.device("cpu")
    text = TextEmbedding(torch.empty(1, 226, 4096), torch.ones(1, 226, dtype=torch.bool))
    recorded = json.loads((DATA / "flops.json").read_text())["cogvideox_2b"][key]["total"]
    assert count_row_flops(blueprint.model, text).forward == pytest.approx(recorded, rel=1e-3)


SIZES = json.loads((DATA / "latent_sizes.json").read_text())["rows"]


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['num_frames']}x{row['height']}x{row['width']}")
def test_sizes_that_come_back_whole_are_taken_and_others_refused(row: dict[str, Any]) -> None:
    frames, height, width = row["num_frames"], row["height"], row["width"]
    rule = CogVideoX.card.sizes
    if row["usable"] and row["decoded_frames"] == frames:
        rule.check_frames(frames)
        rule.check_sides(height, width)
        setup = Setup(published.TRANSFORMER, published.VAE, {}, height, width, frames, 8, "")
        _, batches, *_ = row["latent_shape_BTCHW"]
        assert CogVideoX.latent_size(setup) == (16, *row["latent"])
        assert batches == row["latent"][0]
    elif not row["usable"]:
        with pytest.raises(ValueError, match="must be divisible by 16"):
            rule.check_sides(height, width)
    else:
        with pytest.raises(ValueError, match=rf"num_frames={frames} must be 8k \+ 1 or 8k \+ 8"):
            rule.check_frames(frames)
