"""Rectified flow against recordings of the public code (tests/data/opensora/rflow_*, stdit3_tiny*)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vpo_engine.models.opensora.rectified_flow import RectifiedFlow, caption_states, guided_velocity
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
    x0, noise, t = (recorded[name] for name in ("x0", "noise", "t"))
    flow = RectifiedFlow()
    torch.testing.assert_close(flow.add_noise(x0, noise, t), recorded["x_t"], rtol=0, atol=1e-6)
    assert torch.equal(flow.target(x0, noise), recorded["target"])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return TRAINING["gain"] * x_t + TRAINING["bias"] * t[:, None, None, None, None] / 1000

    torch.testing.assert_close(flow.training_loss(predict, x0, noise, t), recorded["loss"], rtol=1e-6, atol=0)


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


@torch.no_grad()
def integrated(
    flow: RectifiedFlow, predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, *, steps: int, **size: Any
) -> Tensor:
    """Noise to latents by the flow's solver."""
    solver = flow.solver(steps, **size)
    for step, time in enumerate(solver.times):
        z, _ = solver.advance(step, z, predict(z, torch.full((len(z),), time)), ())
    return z


@torch.no_grad()
def conditioned(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    frame_mask: Tensor,
    draws: Iterator[Tensor],
    *,
    steps: int,
    **size: Any,
) -> Tensor:
    """The published loop with frames that are given: mask [B, T] is 0 where a frame stays clean, 1 where it is made,
    and a fraction where it joins at that share of the noise."""
    flow = RectifiedFlow()
    solver, joined = flow.solver(steps, **size), frame_mask == 1
    for step, time in enumerate(solver.times):
        t = torch.full((len(z),), time)
        active = frame_mask * flow.num_timesteps >= min(time, flow.num_timesteps)
        joining = (active & ~joined)[:, None, :, None, None]
        noised = torch.where(joining, flow.add_noise(z, next(draws), t), z)
        moved, _ = solver.advance(step, noised, predict(noised, t, active), ())
        z = torch.where(active[:, None, :, None, None], moved, noised)
        joined = active
    return z


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
    out = integrated(
        flow,
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


class RunOfTiny:
    """The recorded run of the tiny model: predictions, and per step z, t and the frames that took part."""

    def __init__(self, network: STDiT3, inputs: dict[str, Tensor]) -> None:
        self._network, self._inputs = network, inputs
        info = TINY["sample"]["info"]
        self.size = {name: info[name] for name in ("height", "width", "num_frames")}
        self.steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._named = {name: info[name] for name in ("fps", "height", "width")}

    def predict(self, z: Tensor, t: Tensor) -> Tensor:
        self.steps.append((z, t, None))
        captions = self._inputs["sample.y"][:, 0]
        null, guidance = self._network.y_embedder.y_embedding, TINY["sample"]["cfg"]
        mask = self._inputs["sample.mask"]
        return guided_velocity(self._network, z, t, captions, mask, null, guidance, **self._named)

    def predict_some(self, z: Tensor, t: Tensor, x_mask: Tensor) -> Tensor:
        self.steps.append((z, t, x_mask))
        null, guidance = self._network.y_embedder.y_embedding, TINY["sample"]["cfg"]
        y = caption_states(self._inputs["sample.y"][:, 0], null, guidance)
        both = (torch.cat([z, z]), torch.cat([t, t]), y, self._inputs["sample.mask"], x_mask.repeat(2, 1))
        prompted, unprompted = self._network(*both, **self._named)[:, : z.shape[1]].chunk(2)
        return unprompted + guidance * (prompted - unprompted)


def test_guided_sampling_with_the_tiny_model_equals_the_public_code(tiny):
    inputs = load_file(DATA / "stdit3_tiny_inputs.safetensors")
    recorded = load_file(DATA / "stdit3_tiny_outputs.safetensors")
    run = RunOfTiny(tiny, inputs)
    count = TINY["sample"]["steps"]
    out = integrated(RectifiedFlow(), run.predict, inputs["sample.z0"], steps=count, **run.size)
    trajectory, times, _ = zip(*run.steps, strict=True)
    torch.testing.assert_close(torch.stack(times), recorded["sample.timesteps"], rtol=TIME_TOLERANCE, atol=0)
    torch.testing.assert_close(
        torch.stack(trajectory), recorded["sample.trajectory"], rtol=0, atol=LOOP_TOLERANCE
    )
    torch.testing.assert_close(out, recorded["sample.out"], rtol=0, atol=LOOP_TOLERANCE)


def test_conditioned_sampling_with_the_tiny_model_equals_the_public_code(tiny):
    """The engine conditions on no frames; the published forward takes x_mask, and is held to it."""
    inputs = load_file(DATA / "stdit3_tiny_inputs.safetensors")
    recorded = load_file(DATA / "stdit3_tiny_outputs.safetensors")
    run, frame_mask = RunOfTiny(tiny, inputs), inputs["sample_masked.mask"]
    count, draws = TINY["sample"]["steps"], iter(inputs["sample_masked.noise"])
    out = conditioned(run.predict_some, inputs["sample.z0"], frame_mask, draws, steps=count, **run.size)
    trajectory, _, active = zip(*run.steps, strict=True)
    assert torch.equal(
        torch.stack([mask for mask in active if mask is not None]), recorded["sample_masked.x_mask"]
    )
    torch.testing.assert_close(
        torch.stack(trajectory), recorded["sample_masked.trajectory"], rtol=0, atol=LOOP_TOLERANCE
    )
    torch.testing.assert_close(out, recorded["sample_masked.out"], rtol=0, atol=LOOP_TOLERANCE)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_a_straight_flow_is_integrated_exactly_in_any_number_of_steps(steps):
    x0, noise = torch.randn(2, 2, 4, 5, 3, 3).unbind(0)
    size = {"height": 240, "width": 426, "num_frames": 34}
    out = integrated(RectifiedFlow(), lambda z, t: x0 - noise, noise, steps=steps, **size)
    torch.testing.assert_close(out, x0, rtol=0, atol=5e-6)


def test_a_preview_of_a_straight_flow_is_where_it_ends():
    x0, noise = torch.randn(2, 2, 4, 5, 3, 3).unbind(0)
    solver = RectifiedFlow().solver(4, 240, 426, 34)
    after, _ = solver.advance(0, noise, x0 - noise, ())
    assert (after - x0).abs().max() > 0.1
    torch.testing.assert_close(solver.preview(0, noise, after, x0 - noise), x0, rtol=0, atol=5e-6)


# --- Guidance ---


class Recorder:
    """A network whose velocity is the mean of its caption, beside four junk channels."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, z: Tensor, t: Tensor, y: Tensor, mask: Any, **geometry: Any) -> Tensor:
        self.calls.append({"z": z, "t": t, "y": y, "mask": mask, **geometry})
        velocity = y.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1).expand_as(z)
        return torch.cat([velocity, torch.full_like(z, 123.0)], dim=1)


def test_guidance_runs_prompts_then_nulls_in_one_pass_with_the_prompts_masks():
    z, t, text = torch.randn(2, 4, 3, 2, 2), torch.tensor([5.0, 6.0]), torch.randn(2, 7, 8)
    null, mask = torch.randn(9, 8), torch.ones(2, 7, dtype=torch.bool)
    network = Recorder()
    out = guided_velocity(network, z, t, text, mask, null, 7.0, fps=24, height=16, width=16)
    (call,) = network.calls
    assert torch.equal(call["z"], torch.cat([z, z]))
    assert call["t"].tolist() == [5, 6, 5, 6]
    assert torch.equal(call["y"], torch.cat([text, null[:7].expand(2, 7, 8)])[:, None])
    assert call["mask"] is mask
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
