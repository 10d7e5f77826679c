"""VADER, InstructVideo and T2V-Turbo through train(): against plain formulas, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import gradient_toy
import pytest
import torch
from gradient_toy import GradientReward, latents_of, pixel_scores, pixels_of
from torch import Tensor
from toy import SHAPE, ToyNetwork, caption_of, sampling_times, velocity

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.data.preference_dataset import read_dataset
from vpo_engine.data.prompts import PromptStream
from vpo_engine.distributed.processes import Processes
from vpo_engine.seeding import generator, integer, normal

METHODS = {
    "vader": ("method=vader", "vader.steps=5", "vader.last_steps=3", "vader.guidance=2"),
    "vader, random": ("method=vader", "vader.steps=5", "vader.random_steps=true", "vader.guidance=1"),
    "instructvideo": ("method=instructvideo", "instructvideo.steps=5", "instructvideo.strength=0.7"),
    "t2v_turbo": ("method=t2v_turbo", "t2v_turbo.steps=6", "t2v_turbo.reward_weight=0.3"),
}
BATCH = 4


def make_config(folder: Path, *settings: str) -> Config:
    return engine.make_config(folder, *gradient_toy.SETTINGS, *settings)


def train(config: Config) -> engine.Recording:
    return engine.train(config, GradientReward())


class First:
    """The first step of a run, to be computed again: its prompts, captions, noise and real videos, and the rewards."""

    def __init__(self, config: Config) -> None:
        self.seed, self.network = config.seed, ToyNetwork()
        self.prompts = [item.text for item in PromptStream(engine.PROMPTS, self.seed).take(0, BATCH)]
        model = build_model(config, Processes.start("cpu"))
        model.prepare(self.prompts)
        self.captions = caption_of(model.embed(self.prompts))

    def noise(self, purpose: str) -> Tensor:
        return torch.cat([normal((1, *SHAPE), self.seed, purpose, place) for place in range(BATCH)])

    def real(self) -> Tensor:
        """The clean latents of the videos that the toy world draws."""
        videos = [
            torch.randint(
                0, 256, (3, 4, 4, 3), generator=generator(self.seed, "real video", place), dtype=torch.uint8
            )
            for place in range(BATCH)
        ]
        return latents_of(torch.stack(videos).movedim(4, 1).float() / 127.5 - 1)

    def scores(self, latents: Tensor) -> Tensor:
        pairs = zip(pixels_of(latents), self.prompts, strict=True)
        return torch.stack([pixel_scores(*each) for each in pairs])

    def rewards(self, latents: Tensor) -> Tensor:
        scores = self.scores(latents)
        return (scores[:, 0] + 3 * scores[:, 2]) / 4

    def euler(self, x: Tensor, steps: range, guidance: float, of: int = 5) -> Tensor:
        times = sampling_times(of)
        for step in steps:
            t = torch.full((BATCH,), times[step])
            x = x + velocity(self.network, x, t, self.captions, guidance) / of
        return x

    def assert_row(self, row: dict[str, Any], loss: Tensor, rewards: Tensor) -> None:
        loss.backward()
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        norm = torch.cat([each.flatten() for each in gradients]).norm()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["reward/selected"] == pytest.approx(rewards.mean().item(), rel=1e-5)


@pytest.mark.parametrize("last_steps", [1, 3, 5])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_step_of_vader_is_the_formula(tmp_path: Path, last_steps: int, guidance: float) -> None:
    """An Euler loop without gradient to the last K steps, these with gradient, and the reward of where they end."""
    settings = (f"vader.last_steps={last_steps}", f"vader.guidance={guidance}", "steps=1")
    config = make_config(tmp_path, *METHODS["vader"], *settings)
    train(config)
    [row] = engine.metrics_of(tmp_path / "run")
    first = First(config)
    with torch.no_grad():
        x = first.euler(first.noise("rollout"), range(5 - last_steps), guidance)
    rewards = first.rewards(first.euler(x, range(5 - last_steps, 5), guidance))
    first.assert_row(row, -rewards.mean(), rewards)


def test_vader_draws_k_anew_in_every_step(tmp_path: Path) -> None:
    config = make_config(tmp_path, *METHODS["vader, random"], "steps=3")
    recording = train(config)
    sampled = [stop.stop for _, settings, stop, _ in recording.sampled if settings.steps == 5]
    drawn = [1 + integer(5, config.seed, "vader", step) for step in range(3)]
    assert sampled == [5 - count for count in drawn]
    assert len(set(drawn)) > 1


def test_vaders_goal_and_scale_change_its_loss(tmp_path: Path) -> None:
    config = make_config(tmp_path, *METHODS["vader"], "vader.goal=2.5", "vader.scale=0.5", "steps=1")
    train(config)
    [row] = engine.metrics_of(tmp_path / "run")
    first = First(config)
    with torch.no_grad():
        x = first.euler(first.noise("rollout"), range(2), 2.0)
    rewards = first.rewards(first.euler(x, range(2, 5), 2.0))
    first.assert_row(row, 0.5 * (rewards - 2.5).abs().mean(), rewards)


def test_vader_mixes_the_losses_of_two_rewards(tmp_path: Path) -> None:
    second = (
        "vader.second={kind: gradient_toy:GradientReward, dimensions: [temporal_consistency], weight: 0.5}"
    )
    config = make_config(tmp_path, *METHODS["vader"], second, "vader.weight=2", "steps=1")
    train(config)
    [row] = engine.metrics_of(tmp_path / "run")
    first = First(config)
    with torch.no_grad():
        x = first.euler(first.noise("rollout"), range(2), 2.0)
    latents = first.euler(x, range(2, 5), 2.0)
    rewards, others = first.rewards(latents), first.scores(latents)[:, 1]
    first.assert_row(row, (-2 * rewards.mean() - 0.5 * others.mean()) / 2, rewards)
    assert row["reward/second"] == pytest.approx(others.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (("instructvideo.strength=0.7",), 1),
        (("instructvideo.strength=0.6",), 2),
        (("instructvideo.strength=0.2",), 4),
        (("instructvideo.strength=0.5", "instructvideo.strength_of=noise"), 3),
    ],
)
def test_a_step_of_instructvideo_is_the_formula(
    tmp_path: Path, settings: tuple[str, ...], start: int
) -> None:
    """Real videos are noised to the time of the chain's first step; its last step alone has a gradient."""
    own = ("method=instructvideo", "instructvideo.steps=5", *settings)
    config = make_config(tmp_path, *own, "steps=1")
    train(config)
    [row] = engine.metrics_of(tmp_path / "run")
    first, level = First(config), 1 - start / 5
    x = (1 - level) * first.real() + level * first.noise("edit")
    with torch.no_grad():
        x = first.euler(x, range(start, 4), 3.0)
    rewards = first.rewards(first.euler(x, range(4, 5), 3.0))
    first.assert_row(row, (1 - rewards).mean(), rewards)


def test_a_step_of_t2v_turbo_is_the_formula(tmp_path: Path) -> None:
    """Pseudo-Huber between two answers x + t v, one of them behind the teacher's guided step, minus the reward."""
    config = make_config(tmp_path, *METHODS["t2v_turbo"], "steps=1")
    train(config)
    [row] = engine.metrics_of(tmp_path / "run")
    first = First(config)
    drawn = [integer(6, config.seed, "time", place) for place in range(BATCH)]
    times = torch.tensor([*sampling_times(6), 0.0])
    t, before = times[drawn], times[[place + 1 for place in drawn]]

    def answer(x: Tensor, t: Tensor) -> Tensor:
        return x + t.view(-1, 1, 1, 1, 1) / 1000 * velocity(first.network, x, t, first.captions, 1.0)

    share = t.view(-1, 1, 1, 1, 1) / 1000
    x = (1 - share) * first.real() + share * first.noise("distil")
    with torch.no_grad():
        step = ((t - before) / 1000).view(-1, 1, 1, 1, 1)
        moved = x + step * velocity(first.network, x, t, first.captions, 8.5)
        target = answer(moved, before)
    found = answer(x, t)
    rewards = first.rewards(found)
    distance = ((found - target).square() + 1e-6).sqrt().mean() - 1e-3
    first.assert_row(row, distance - 0.3 * rewards.mean(), rewards)


def test_the_teacher_is_the_policy_of_the_start_and_is_never_refreshed(tmp_path: Path) -> None:
    recording = train(make_config(tmp_path, *METHODS["t2v_turbo"], "steps=4"))
    assert {(call["who"], call["guidance"]) for call in recording.asked} >= {
        ("reference", 8.5),
        ("policy", 1.0),
    }
    assert all(call["guidance"] == 8.5 for call in recording.asked if call["who"] == "reference")
    kept = [engine.reference_of(tmp_path / "run", step) for step in (1, 4)]
    start = ToyNetwork().state_dict()
    for name, value in kept[1].items():
        assert torch.equal(kept[0][name], value)
    moved = engine.policy_of(tmp_path / "run", 4)
    assert any(not torch.equal(moved[name], start[name]) for name in start)


def test_videos_come_from_the_winners_of_another_run(tmp_path: Path) -> None:
    """The latents are those that the run stored, and its prompts take the place of prompts.train."""
    engine.train(engine.make_config(tmp_path / "pairs"))
    stored = [pair for pair in read_dataset(tmp_path / "pairs" / "run") if pair.kept]
    own = ("method=instructvideo", "instructvideo.steps=5", "instructvideo.strength=0.2")
    source = f"instructvideo.videos={tmp_path / 'pairs' / 'run'}"
    config = make_config(tmp_path, *own, source, "prompts.train=null", "steps=1")
    recording = train(config)
    calls = [latents for _, settings, _, latents in recording.sampled if settings.steps == 5]
    for number, latents in enumerate(calls[0]):
        clean = stored[number].latents()[0]
        expected = 0.8 * clean + 0.2 * normal((1, *SHAPE), config.seed, "edit", number)[0]
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_videos_of_its_own_needs_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(gradient_toy.GradientModel, "real_video")
    config = make_config(tmp_path, *METHODS["instructvideo"])
    with pytest.raises(
        ValueError, match=r"instructvideo\.videos is not set, and toy has no videos of its own"
    ):
        entry.train(config)
