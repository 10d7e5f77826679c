"""Rectified flow against recordings of the public code (tests/data/opensora/rflow_*, stdit3_tiny*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vpo_engine.models.opensora.rectified_flow import RectifiedFlow, guided_velocity
from vpo_engine.models.opensora.stdit3 import STDiT3

DATA = Path(__file__).parents[1] / "data" / "opensora"
TRANSFORM = json.loads((DATA / "rflow_timestep_transform.json").read_text())["rows"]
SAMPLING = json.loads((DATA / "rflow_sampling_timesteps.json").read_text())["rows"]
LOOPS = json.loads((DATA / "rflow_sampling_loop.json").read_text())["cases"]
TRAINING = json.loads((DATA / "rflow_training.json").read_text())
TINY = json.loads((DATA / "stdit3_tiny.json").read_text())

TIME_TOLERANCE = 2.5e-7  # relative: two float32 roundings
LOOP_TOLERANCE = 5e-4  # max abs: float32 rounding of t is amplified by the network
FLOWS = {
    "t_fp32_kwargs": RectifiedFlow(),
    "t_bf16_kwargs": RectifiedFlow(geometry_dtype=torch.bfloat16),
    "timesteps_fp32_kwargs": RectifiedFlow(),
    "timesteps_bf16_kwargs": RectifiedFlow(geometry_dtype=torch.bfloat16),
}


def geometry(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("height", "width", "num_frames")}


def label(row: dict[str, Any]) -> str:
    return f"{row['resolution']}x{row['num_frames']}"


# --- Times ---


@pytest.mark.parametrize("kind", ["t_fp32_kwargs", "t_bf16_kwargs"])
@pytest.mark.parametrize("row", TRANSFORM, ids=label)
def test_timestep_transform_equals_the_public_code(row, kind):
    found = FLOWS[kind].timestep_transform(torch.tensor(row["raw_t"]), **geometry(row))
    torch.testing.assert_close(found, torch.tensor(row[kind]), rtol=TIME_TOLERANCE, atol=0)


@pytest.mark.parametrize("kind", ["timesteps_fp32_kwargs", "timesteps_bf16_kwargs"])
@pytest.mark.parametrize("row", SAMPLING, ids=label)
def test_sampling_timesteps_equal_the_public_code(row, kind):
    times, lengths = FLOWS[kind].sampling_timesteps(row["steps"], **geometry(row))
    torch.testing.assert_close(times, torch.tensor(row[kind]), rtol=TIME_TOLERANCE, atol=0)
    assert bool((lengths > 0).all())
    assert lengths.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("frames", [34, 51])
def test_training_times_equal_the_public_draw(frames):
    recorded = load_file(DATA / "rflow_training.safetensors")
    z, size = recorded["logitnormal_z"], {"height": 240, "width": 426, "num_frames": frames}
    expected = recorded[f"logitnormal_t_240p_{frames}f"]
    torch.manual_seed(TRAINING["logitnormal"]["seed"])
    torch.testing.assert_close(
        torch.randn(z.shape), z, rtol=1e-6, atol=1e-6
    )  # vector widths differ by an ulp
    torch.testing.assert_close(torch.sigmoid(z), recorded["logitnormal_raw_u"])
    flow = RectifiedFlow()
    torch.testing.assert_close(flow.timesteps_from_normal(z, **size), expected, rtol=1e-6, atol=0)
    uniform = torch.special.ndtr(z.double())
    from_uniform = flow.draw_timesteps(uniform, **size)
    torch.testing.assert_close(from_uniform, expected.double(), rtol=1e-6, atol=0)


def test_training_times_are_logit_normal_without_the_transform():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = RectifiedFlow(use_timestep_transform=False).draw_timesteps(u, height=64, width=64, num_frames=5)
    assert bool((t.diff() > 0).all())
    logits = torch.logit(t / 1000)
    assert logits.mean().item() == pytest.approx(0, abs=1e-6)
    assert logits.std().item() == pytest.approx(1, abs=1e-3)
    ends = RectifiedFlow().draw_timesteps(torch.tensor([0.0, 1.0]), height=240, width=426, num_frames=34)
    assert ends.tolist() == [0.0, 1000.0]


def test_short_clips_refuse_the_transform():
    with pytest.raises(ValueError, match=r"num_frames=16: .* 1 or at least 17; turn use_timestep_transform"):
        RectifiedFlow().timestep_transform(torch.tensor([1.0]), height=64, width=64, num_frames=16)
    RectifiedFlow(use_timestep_transform=False).sampling_timesteps(4, height=64, width=64, num_frames=16)


def test_sampling_needs_a_step():
    with pytest.raises(ValueError, match="steps=0: sampling needs at least 1"):
        RectifiedFlow().sampling_timesteps(0, height=64, width=64, num_frames=1)


# --- Training ---


def test_noising_target_and_losses_equal_the_public_code():
    recorded = load_file(DATA / "rflow_training.safetensors")
    x0, noise, t, keep = (recorded[name] for name in ("x0", "noise", "t", "x_mask"))
    flow = RectifiedFlow()
    torch.testing.assert_close(flow.add_noise(x0, noise, t), recorded["x_t"], rtol=0, atol=1e-6)
    assert torch.equal(flow.target(x0, noise), recorded["target"])

    seen: list[Tensor] = []

    def predict(x_t: Tensor, t: Tensor, x_mask: Tensor | None = None) -> Tensor:
        seen.append(x_t)
        return TRAINING["gain"] * x_t + TRAINING["bias"] * t[:, None, None, None, None] / 1000

    torch.testing.assert_close(flow.training_loss(predict, x0, noise, t), recorded["loss"], rtol=1e-6, atol=0)
    masked = flow.training_loss(predict, x0, noise, t, keep)
    torch.testing.assert_close(masked, recorded["loss_masked"], rtol=1e-6, atol=0)
    torch.testing.assert_close(seen[1], recorded["x_t_masked"], rtol=0, atol=1e-6)
    held = ~keep[:, None, :, None, None].expand_as(x0)
    assert torch.equal(seen[1][held], x0[held])


def test_times_0_and_1000_are_exactly_clean_and_noise():
    x0, noise = torch.randn(2, 2, 4, 3, 2, 2).unbind(0)
    flow = RectifiedFlow()
    assert torch.equal(flow.add_noise(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.full((2,), 1000.0)), noise)


def test_bfloat16_latents_are_noised_in_float32():
    x0, noise = torch.randn(2, 2, 4, 3, 2, 2).bfloat16().unbind(0)
    t = torch.tensor([123.4, 987.6])
    found = RectifiedFlow().add_noise(x0, noise, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, RectifiedFlow().add_noise(x0.float(), noise.float(), t))
    assert RectifiedFlow().target(x0, noise).dtype == torch.bfloat16


# --- Sampling ---


@pytest.mark.parametrize("case", sorted(LOOPS))
def test_sampling_loop_equals_the_public_code(case):
    recorded, settings = load_file(DATA / "rflow_sampling_loop.safetensors"), LOOPS[case]
    y = torch.stack([recorded[f"{case}.y_cond"], recorded[f"{case}.y_null"]])
    gains = torch.tensor([settings["a_cond"], settings["a_uncond"]]).view(2, 1, 1, 1, 1, 1)
    trajectory: list[Tensor] = []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        trajectory.append(z)
        time = settings["tcoef"] * t[:, None, None, None, None] / 1000
        prompted, unprompted = gains * z + time + 0.1 * y.unsqueeze(-1)
        return unprompted + settings["cfg"] * (prompted - unprompted)

    flow = RectifiedFlow(use_timestep_transform=settings["transform"])
    out = flow.sample(
        predict,
        recorded[f"{case}.z0"],
        steps=settings["steps"],
        height=settings["hw"][0],
        width=settings["hw"][1],
        num_frames=settings["frames"],
    )
    torch.testing.assert_close(torch.stack(trajectory), recorded[f"{case}.trajectory"], rtol=0, atol=1e-4)
    torch.testing.assert_close(out, recorded[f"{case}.out"], rtol=0, atol=1e-4)


@pytest.fixture
def tiny() -> STDiT3:
    network = STDiT3.from_config(TINY["config"])
    network.load_state_dict(load_file(DATA / "stdit3_tiny_weights.safetensors"))
    return network


def run_tiny(
    network: STDiT3, inputs: dict[str, Tensor], **masking: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """The recorded run: result, and per step z, t and the frames that took part."""
    settings, info = TINY["sample"], TINY["sample"]["info"]
    size = {"height": info["height"], "width": info["width"]}
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def predict(z: Tensor, t: Tensor, x_mask: Tensor | None = None) -> Tensor:
        steps.append((z, t, x_mask))
        return guided_velocity(
            network,
            z,
            t,
            inputs["sample.y"][:, 0],
            inputs["sample.mask"],
            network.y_embedder.y_embedding,
            settings["cfg"],
            x_mask,
            fps=info["fps"],
            **size,
        )

    out = RectifiedFlow().sample(
        predict,
        inputs["sample.z0"],
        steps=settings["steps"],
        num_frames=info["num_frames"],
        **size,
        **masking,
    )
    trajectory, times, active = zip(*steps, strict=True)
    return out, list(trajectory), list(times), list(active)


def test_guided_sampling_with_the_tiny_model_equals_the_public_code(tiny):
    inputs = load_file(DATA / "stdit3_tiny_inputs.safetensors")
    recorded = load_file(DATA / "stdit3_tiny_outputs.safetensors")
    out, trajectory, times, _ = run_tiny(tiny, inputs)
    torch.testing.assert_close(torch.stack(times), recorded["sample.timesteps"], rtol=TIME_TOLERANCE, atol=0)
    torch.testing.assert_close(
        torch.stack(trajectory), recorded["sample.trajectory"], rtol=0, atol=LOOP_TOLERANCE
    )
    torch.testing.assert_close(out, recorded["sample.out"], rtol=0, atol=LOOP_TOLERANCE)


def test_conditioned_sampling_with_the_tiny_model_equals_the_public_code(tiny):
    inputs = load_file(DATA / "stdit3_tiny_inputs.safetensors")
    recorded = load_file(DATA / "stdit3_tiny_outputs.safetensors")
    draws = iter(inputs["sample_masked.noise"])
    frame_mask = inputs["sample_masked.mask"]
    out, trajectory, _, active = run_tiny(
        tiny, inputs, frame_mask=frame_mask, draw_noise=lambda _: next(draws)
    )
    assert torch.equal(
        torch.stack([mask for mask in active if mask is not None]), recorded["sample_masked.x_mask"]
    )
    torch.testing.assert_close(
        torch.stack(trajectory), recorded["sample_masked.trajectory"], rtol=0, atol=LOOP_TOLERANCE
    )
    torch.testing.assert_close(out, recorded["sample_masked.out"], rtol=0, atol=LOOP_TOLERANCE)
    kept = (frame_mask == 0)[:, None, :, None, None].expand_as(out)
    assert torch.equal(out[kept], inputs["sample.z0"][kept])


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_a_straight_flow_is_integrated_exactly_in_any_number_of_steps(steps):
    x0, noise = torch.randn(2, 2, 4, 5, 3, 3).unbind(0)
    out = RectifiedFlow().sample(
        lambda z, t: x0 - noise, noise, steps=steps, height=240, width=426, num_frames=34
    )
    torch.testing.assert_close(out, x0, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("height", "width", "frames"), [(64, 64, 17), (64, 184, 1), (240, 426, 34)])
def test_generating_every_frame_is_sampling_without_a_mask(height, width, frames):
    """At the first two sizes the first time rounds to an ulp above 1000."""
    noise, size = torch.randn(2, 4, 5, 3, 3), {"height": height, "width": width, "num_frames": frames}

    def predict(z: Tensor, t: Tensor, x_mask: Tensor | None = None) -> Tensor:
        assert x_mask is None or bool(x_mask.all())
        return 0.3 * z + t[:, None, None, None, None] / 1000

    plain = RectifiedFlow().sample(predict, noise, steps=5, **size)
    masked = RectifiedFlow().sample(predict, noise, steps=5, frame_mask=torch.ones(2, 5), **size)
    assert torch.equal(plain, masked)


def test_sampling_builds_no_graph_and_keeps_the_noise():
    noise, weight = torch.randn(1, 4, 5, 3, 3), torch.ones((), requires_grad=True)
    before = noise.clone()
    out = RectifiedFlow().sample(lambda z, t: weight * z, noise, steps=2, height=64, width=64, num_frames=17)
    assert not out.requires_grad
    assert torch.equal(noise, before)


# --- Guidance ---


class Recorder:
    """A network whose velocity is the mean of its caption, beside four junk channels."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, z: Tensor, t: Tensor, y: Tensor, mask: Any, x_mask: Any, **geometry: Any) -> Tensor:
        self.calls.append({"z": z, "t": t, "y": y, "mask": mask, "x_mask": x_mask, **geometry})
        velocity = y.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1).expand_as(z)
        return torch.cat([velocity, torch.full_like(z, 123.0)], dim=1)


def test_guidance_runs_prompts_then_nulls_in_one_pass_with_the_prompts_masks():
    z, t, text = torch.randn(2, 4, 3, 2, 2), torch.tensor([5.0, 6.0]), torch.randn(2, 7, 8)
    null, mask = torch.randn(9, 8), torch.ones(2, 7, dtype=torch.bool)
    frames = torch.tensor([[True, True, False], [True, True, True]])
    network = Recorder()
    out = guided_velocity(network, z, t, text, mask, null, 7.0, frames, fps=24, height=16, width=16)
    (call,) = network.calls
    assert torch.equal(call["z"], torch.cat([z, z]))
    assert call["t"].tolist() == [5, 6, 5, 6]
    assert torch.equal(call["y"], torch.cat([text, null[:7].expand(2, 7, 8)])[:, None])
    assert call["mask"] is mask
    assert torch.equal(call["x_mask"], torch.cat([frames, frames]))
    assert (call["fps"], call["height"], call["width"]) == (24, 16, 16)
    prompted, unprompted = text.mean((1, 2)), null[:7].mean()
    expected = (unprompted + 7.0 * (prompted - unprompted)).view(2, 1, 1, 1, 1).expand_as(z)
    torch.testing.assert_close(out, expected)


def test_guidance_1_asks_for_the_prompts_only():
    z, text, network = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 7, 8), Recorder()
    out = guided_velocity(network, z, torch.ones(2), text, None, torch.randn(9, 8), 1.0)
    assert network.calls[0]["z"] is z
    torch.testing.assert_close(out, text.mean((1, 2)).view(2, 1, 1, 1, 1).expand_as(z))


def test_guidance_needs_a_null_caption_as_long_as_the_text():
    with pytest.raises(ValueError, match="text has 7 tokens, but the null caption only 6; encode prompts"):
        guided_velocity(
            Recorder(),
            torch.zeros(1, 4, 1, 2, 2),
            torch.ones(1),
            torch.zeros(1, 7, 8),
            None,
            torch.zeros(6, 8),
            2.0,
        )
