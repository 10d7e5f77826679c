"""The arithmetic of the methods against numbers that their public code gave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from baselines import ARRAYS, RECORDED, double, opensora_of
from torch import Tensor

from vpo_engine.model_values import SamplerSettings, TextEmbedding
from vpo_engine.objectives.consistency import (
    boundary_scalings,
    consistency_output,
    guidance_embedding,
    pseudo_huber,
    split,
)
from vpo_engine.objectives.reward_losses import (
    AESTHETIC,
    HPS,
    PICKSCORE,
    Goal,
    mixed,
    refl_loss,
    segmental_loss,
    vader_goal,
)
from vpo_engine.rewards.frames import segment_weights
from vpo_engine.rollout.reward_gradient import denoise_with_gradients, first_of_partial
from vpo_engine.rollout.scored_frames import frame_of_each_segment, random_frames
from vpo_engine.t2v_turbo import T2VTurbo

VADER = RECORDED["vader_truncated_backprop_rflow"]
TURBO = RECORDED["t2v_turbo"]


def test_refl_pushes_rewards_below_the_margin_alone() -> None:
    recorded = RECORDED["refl"]
    rewards = double(recorded["rewards"]).requires_grad_()
    loss = refl_loss(rewards, scale=recorded["grad_scale"])
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-12)
    torch.testing.assert_close(rewards.grad, double(recorded["grad"]), rtol=1e-12, atol=0)


def test_refl_without_a_margin_pushes_every_reward() -> None:
    rewards = double([-1.0, 5.0]).requires_grad_()
    refl_loss(rewards, None, 0.1).backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-0.05, -0.05]


def test_vaders_losses_and_their_mix() -> None:
    recorded = RECORDED["vader_rewards"]
    aesthetic, hps = double(recorded["aesthetic"]), double(recorded["hps"])
    losses = AESTHETIC.loss(aesthetic), HPS.loss(hps)
    assert float(losses[0]) == pytest.approx(recorded["aesthetic_loss"], rel=1e-12)
    assert float(losses[1]) == pytest.approx(recorded["hps_loss"], rel=1e-12)
    assert float(mixed(losses, (1.5, 1.0))) == pytest.approx(recorded["mixed_loss"], rel=1e-12)
    logged = mixed([aesthetic.mean(), hps.mean()], (1.0, 15.0))
    assert float(logged) == pytest.approx(recorded["logged_reward"], rel=1e-12)


def test_vaders_loss_of_pickscore_is_its_distance_from_100() -> None:
    assert float(PICKSCORE.loss(double([21.0, 25.0]))) == pytest.approx((0.79 + 0.75) / 2, rel=1e-12)


@pytest.mark.parametrize("case", VADER["cases"], ids=lambda case: f"K={case['steps_with_gradient']}")
def test_vaders_gradient_through_the_last_steps_of_open_sora(case: dict[str, Any]) -> None:
    """The sampler is the engine's own: the solver, guidance in one pass, and checkpointed steps."""
    model = opensora_of(VADER)
    settings = SamplerSettings(VADER["sampling_steps"], VADER["cfg_scale"])
    times = torch.tensor(model.solver(settings.steps).times)
    torch.testing.assert_close(times, torch.tensor(VADER["transformed_timesteps"]), rtol=0, atol=1e-4)
    text = TextEmbedding(double(VADER["y"])[:, None], torch.ones(len(VADER["y"]), 1, dtype=torch.bool))
    state = model.start(ARRAYS[VADER["z"]])
    state = model.denoise(model.network, state, text, settings, case["first_step_with_gradient"])
    assert not state.latents.requires_grad
    found = denoise_with_gradients(model, model.network, state, text, settings).latents
    loss = found.square().mean()
    loss.backward()
    network: Any = model.network
    expected = double(case["grad_lora"])
    tolerance = VADER["tol"]
    torch.testing.assert_close(network.adapter.grad, expected, rtol=tolerance, atol=tolerance)
    assert (network.base.grad is None) is case["base_grad_is_none"]
    assert loss.item() == pytest.approx(case["loss"], rel=tolerance)
    assert found.sum().item() == pytest.approx(case["final_sum"], rel=tolerance)
    assert found.norm().item() == pytest.approx(case["final_l2"], rel=tolerance)


def test_instructvideos_partial_chain() -> None:
    recorded = RECORDED["instructvideo_steps"]
    steps = recorded["ddim_steps"]
    first = first_of_partial(recorded["starting_partial"], len(steps))
    assert steps[first:] == recorded["used"]
    assert steps[first] == recorded["noising_timestep"]
    assert steps[-1:] == recorded["steps_with_gradient"]


@pytest.mark.parametrize(
    ("strength", "steps", "run"), [(1.0, 7, 7), (0.01, 30, 1), (0.5, 5, 3), (0.7, 10, 7), (0.3, 10, 3)]
)
def test_a_partial_chain_has_its_share_of_steps_rounded_up(strength: float, steps: int, run: int) -> None:
    assert steps - first_of_partial(strength, steps) == run


@pytest.mark.parametrize("case", RECORDED["instructvideo_reward"]["cases"], ids=lambda case: case["frames"])
def test_instructvideos_segmental_reward(case: dict[str, Any]) -> None:
    indices = torch.tensor(case["frame_index"])
    weights = segment_weights(indices, case["frames"], case["lambda_tar"])
    torch.testing.assert_close(weights.double(), double(case["coefficients"]), rtol=1e-6, atol=0)
    loss, rewards = segmental_loss(double(case["hps_scores"]), double(case["coefficients"]))
    torch.testing.assert_close(rewards, double(case["per_video_reward"]), rtol=1e-6, atol=0)
    assert float(loss) == pytest.approx(case["loss"], rel=1e-6)


def test_the_pseudo_huber_distance() -> None:
    found = pseudo_huber(ARRAYS["turbo_pred"], ARRAYS["turbo_target"], TURBO["huber_c"])
    assert float(found) == pytest.approx(TURBO["huber"], rel=1e-6)  # the public code computes it in float32


def test_boundary_scalings() -> None:
    skip, out = boundary_scalings(double(TURBO["timesteps"]))
    torch.testing.assert_close(skip, double(TURBO["c_skip"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(out, double(TURBO["c_out"]), rtol=1e-12, atol=0)


def test_a_students_answer_goes_from_the_latents_at_time_0_to_the_clean_ones() -> None:
    """At 10 t = sigma = 0.5, c_skip is a half and c_out the root of a half."""
    latents, clean = torch.randn(2, 2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    times = double([0.0, 0.05])
    found = consistency_output(latents, times, clean, noise_at_zero=True)
    assert torch.equal(found[0], latents[0])
    torch.testing.assert_close(found[1], 0.5 * latents[1] + 0.5**0.5 * clean[1], rtol=1e-12, atol=0)
    assert consistency_output(latents, times, clean, noise_at_zero=False) is clean


def test_the_embedding_of_guidance_scales() -> None:
    found = guidance_embedding(double(TURBO["w"]))
    assert found.shape == (len(TURBO["w"]), 256)
    torch.testing.assert_close(found.sum(1), double(TURBO["w_embedding_sums"]), rtol=0, atol=1e-10)
    assert guidance_embedding(double(TURBO["w"]), 7)[:, -1].tolist() == [0.0] * len(TURBO["w"])


def test_the_frames_of_a_step_are_drawn_from_all_and_anew() -> None:
    model: Any = SimpleNamespace(video_size=(17, 32, 32))
    drawn = [random_frames(4, model, seed, "vader", step) or [] for seed in (0, 1) for step in range(60)]
    assert all(len(frames) == 4 and frames == sorted(set(frames)) for frames in drawn)
    assert {number for frames in drawn for number in frames} == set(range(17))
    assert len({tuple(frames) for frames in drawn}) > 90
    assert random_frames(None, model, 0, "vader", 0) is None


def test_every_segment_has_a_frame_of_its_own_draw() -> None:
    drawn = [frame_of_each_segment(4, 17, 0, "segments", place) for place in range(60)]
    for part, numbers in enumerate(zip(*drawn, strict=True)):
        assert set(numbers) == set(range(4 * part, 4 * part + 4))
    assert len({tuple(number % 4 for number in frames) for frames in drawn}) > 30


@pytest.mark.parametrize(
    ("reward", "value", "scale", "goal"),
    [
        ("laion_aesthetic", "auto", None, AESTHETIC),
        ("hpsv2", "auto", None, HPS),
        ("hpsv2_1", "auto", None, HPS),
        ("pickscore", "auto", None, PICKSCORE),
        ("sprites", "auto", None, Goal(None, 1.0)),
        ("pickscore", "auto", 0.5, Goal(100.0, 0.5)),
        ("pickscore", 30.0, None, Goal(30.0, 1.0)),
        ("pickscore", None, None, Goal(None, 1.0)),
        ("hpsv2", 2.0, 3.0, Goal(2.0, 3.0)),
    ],
)
def test_vaders_goal_is_the_published_one_unless_another_is_given(
    reward: str, value: Any, scale: float | None, goal: Goal
) -> None:
    assert vader_goal(reward, value, scale) == goal


@pytest.mark.parametrize("kind", ["velocity", "flow", "flow turned round", "noise"])
def test_a_prediction_of_any_kind_splits_latents_into_what_they_were_made_of(kind: str) -> None:
    kept = double([0.9, 0.3])
    added = (1 - kept.square()).sqrt()
    target: Any = {
        "velocity": (-added, kept),
        "flow": (1.0, -1.0),
        "flow turned round": (-1.0, 1.0),
        "noise": (0.0, 1.0),
    }[kind]
    clean, noise = torch.randn(2, 2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()

    def made_of(*scales: Any) -> Tensor:
        one, other = (torch.as_tensor(scale).double().expand(2).view(2, 1, 1, 1, 1) for scale in scales)
        return one * clean + other * noise

    found = split(made_of(kept, added), made_of(*target), (kept, added), target)
    torch.testing.assert_close(found.clean, clean)
    torch.testing.assert_close(found.noise, noise)
    later = double([1.0, 0.6]), double([0.0, 0.8])
    torch.testing.assert_close(found.at(*later), made_of(*later))


def test_t2v_turbo_draws_the_frames_of_each_step_by_the_seed() -> None:
    """They are the same for both halves of a step: here twenty steps of four videos each, for two seeds."""
    method: Any = object.__new__(T2VTurbo)
    method.model = SimpleNamespace(video_size=(17, 32, 32))
    drawn: list[Any] = []
    for seed in (0, 1):
        method.config = SimpleNamespace(seed=seed, pairs_per_step=4)
        drawn += [method._frames(4, [SimpleNamespace(position=place)]) for place in range(0, 80, 2)]
    assert drawn[::2] == drawn[1::2]
    assert len({tuple(frames) for frames in drawn}) > 30
