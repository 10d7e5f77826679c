"""VADER, InstructVideo and T2V-Turbo through train(): against plain formulas, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import gradient_toy
import pytest
import torch
from gradient_toy import GradientReward, latents_of, pixel_scores, pixels_of
from safetensors.torch import save_file
from torch import Tensor
from toy import SHAPE, ToyNetwork, caption_of, numbers_of, sampling_times, velocity

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.data.preference_dataset import read_dataset
from vpo_engine.data.prompts import PromptStream
from vpo_engine.distributed.processes import Processes
from vpo_engine.model_values import TextEmbedding
from vpo_engine.objectives import reward_losses
from vpo_engine.refl import ReFL
from vpo_engine.rollout.given_videos import open_given_videos
from vpo_engine.seeding import generator, integer, normal
from vpo_engine.values import Prompt

METHODS = {
    "vader": ("method=vader", "vader.steps=5", "vader.last_steps=3", "vader.guidance=2"),
    "vader, random": ("method=vader", "vader.steps=5", "vader.random_steps=true", "vader.guidance=1"),
    "instructvideo": ("method=instructvideo", "instructvideo.steps=5", "instructvideo.strength=0.7"),
    "t2v_turbo": ("method=t2v_turbo", "t2v_turbo.steps=6", "t2v_turbo.reward_weight=0.3"),
}
BATCH = 4
OTHER = "test_gradient_methods:Other"
NO_TEXT = TextEmbedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


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


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_of_t2v_turbo_is_the_formula(tmp_path: Path, seed: int) -> None:
    """Pseudo-Huber between two answers x + t v, one of them behind the teacher's guided step, minus the reward."""
    config = make_config(tmp_path, *METHODS["t2v_turbo"], "steps=1", f"seed={seed}")
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


class Other(GradientReward):
    """The same reward under another kind."""


def liked(frame: Tensor, prompt: str) -> Tensor:
    """What the prompt likes of a frame [3, H, W], as ``toy.scores_of`` has it."""
    return 4.0 * (frame.mean(dim=(1, 2)) * numbers_of(prompt, 3)).sum()


class Alignment(GradientReward):
    """A reward of single frames."""

    dimensions = ("text_alignment",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"text_alignment": super().score(videos, prompts)["text_alignment"]}

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        pairs = zip(videos, prompts, strict=True)
        return {"text_alignment": torch.stack([liked(video[0], prompt) for video, prompt in pairs])}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """The frames that each call of the decoder was asked for, of a reward of single frames; OTHER scores videos."""
    found: list[tuple[int, ...] | None] = []
    to_pixels = gradient_toy.GradientModel.to_pixels

    def noted(model: Any, latents: Tensor, frames: Sequence[int] | None) -> Tensor:
        found.append(None if frames is None else tuple(frames))
        return to_pixels(model, latents, frames)

    monkeypatch.setattr("vpo_engine.rollout.scored_frames.scores_single_frames", lambda kind: kind != OTHER)
    monkeypatch.setattr(gradient_toy.GradientModel, "video_size", (3, 4, 4))
    monkeypatch.setattr(gradient_toy.GradientModel, "to_pixels", noted)
    return found


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize(("segments", "seed"), [(1, 0), (3, 0), (1, 1)])
def test_instructvideo_scores_a_frame_of_each_segment(tmp_path: Path, segments: int, seed: int) -> None:
    """Another one for each video, and the less it counts the farther it is from the middle frame."""
    own = (*METHODS["instructvideo"], "instructvideo.strength=0.2", "instructvideo.attenuation=0.5")
    more = (
        f"instructvideo.segments={segments}",
        "reward.dimensions=text_alignment",
        "steps=1",
        f"seed={seed}",
    )
    config = make_config(tmp_path, *own, *more)
    engine.train(config, Alignment())
    [row] = engine.metrics_of(tmp_path / "run")
    first, span = First(config), 3 // segments
    x = 0.8 * first.real() + 0.2 * first.noise("edit")
    videos = pixels_of(first.euler(x, range(4, 5), 3.0))
    found = []
    for place, (video, prompt) in enumerate(zip(videos, first.prompts, strict=True)):
        drawn = [integer(span, config.seed, "segments", place, part) for part in range(segments)]
        frames = [span * part + number for part, number in enumerate(drawn)]
        scores = [math.exp(-0.5 * abs(frame - 1)) * liked(video[frame], prompt) for frame in frames]
        found.append(torch.stack(scores).mean())
    rewards = torch.stack(found)
    first.assert_row(row, (1 - rewards).mean(), rewards)


def test_vader_decodes_so_many_random_frames_anew_in_every_step(
    tmp_path: Path, decoded: list[tuple[int, ...] | None]
) -> None:
    """They are the same for all videos of a step, whatever its micro-batches."""
    few = ("vader.frames=2", "objective.micro_batch_size=2", "steps=8", "checkpoint.every=null")
    train(make_config(tmp_path, *METHODS["vader"], *few))
    assert decoded[::2] == decoded[1::2]
    assert len(decoded) == 2 * 8
    assert set(decoded) <= {(0, 1), (0, 2), (1, 2)}
    assert len(set(decoded)) > 1


def test_vaders_second_reward_has_a_goal_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steadiness is at most 30, so that the distance from 40 is 40 less its mean."""
    monkeypatch.setitem(reward_losses._VADER_GOALS, OTHER, reward_losses.Goal(40.0, 0.5))
    second = f"vader.second={{kind: {OTHER}, dimensions: [temporal_consistency], weight: 0.5}}"
    train(make_config(tmp_path, *METHODS["vader"], second, "vader.weight=2", "steps=1"))
    [row] = engine.metrics_of(tmp_path / "run")
    losses = -row["reward/selected"], 0.5 * (40 - row["reward/second"])
    assert row["loss"] == pytest.approx((2 * losses[0] + 0.5 * losses[1]) / 2, rel=1e-5)


def test_t2v_turbo_follows_a_second_reward_too(tmp_path: Path) -> None:
    second = "t2v_turbo.second={kind: gradient_toy:GradientReward, dimensions: [temporal_consistency], weight: 0.5}"
    rows = []
    for name, more in (("one", ()), ("two", (second,))):
        train(make_config(tmp_path / name, *METHODS["t2v_turbo"], "steps=1", *more))
        rows += engine.metrics_of(tmp_path / name / "run")
    one, two = rows
    assert two["reward/second"] == pytest.approx(two["reward/temporal_consistency"], rel=1e-6)
    assert two["loss"] == pytest.approx(one["loss"] - 0.5 * two["reward/second"], rel=1e-4)
    assert two["grad_norm"] != one["grad_norm"]


def test_a_second_reward_of_videos_sees_all_frames(
    tmp_path: Path, decoded: list[tuple[int, ...] | None]
) -> None:
    """It does so though the first one scores some of them."""
    second = f"t2v_turbo.second={{kind: {OTHER}, dimensions: [temporal_consistency]}}"
    train(make_config(tmp_path, *METHODS["t2v_turbo"], "t2v_turbo.frames=2", second, "steps=1"))
    some, every = decoded
    assert some in {(0, 1), (0, 2), (1, 2)}
    assert every is None


def test_the_log_of_a_method_without_pairs_is_a_mean_over_processes() -> None:
    """The other process has a loss of 3 and a reward of 8."""
    method: Any = object.__new__(ReFL)
    others, stepped = torch.tensor([3.0, 8.0]), []
    method.processes = SimpleNamespace(count=2, sum=lambda values: values + others)
    method.stopping = SimpleNamespace(stoppable=nullcontext)
    method._begin_update = lambda: 0.1
    method._backward = lambda prompts: {"loss": torch.tensor(1.0), "reward/a": torch.tensor(2.0)}
    method._end_update = lambda loss: stepped.append(loss) or 0.5
    assert method._update([]) == {"loss": 2.0, "reward/a": 5.0, "lr": 0.1, "grad_norm": 0.5}
    assert stepped == [2.0]


def test_the_log_counts_the_inputs_with_and_without_a_gradient(tmp_path: Path) -> None:
    """There are two steps without and three with it, of four videos, each with both branches of guidance."""
    train(make_config(tmp_path, *METHODS["vader"], "steps=2"))
    assert engine.work_of(tmp_path / "run") == [(2 * 2 * BATCH, 3 * 2 * BATCH, BATCH)] * 2


def test_given_videos_are_the_winners_of_a_file(tmp_path: Path) -> None:
    """Each comes with its own prompt, in an order that the seed draws."""
    rows = ["winner,loser,prompt"]
    for number in range(8):
        for kind, level in (("winner", number), ("loser", -1 - number)):
            save_file({"latents": torch.full(SHAPE, float(level))}, tmp_path / f"{kind}_{number}.safetensors")
        rows.append(f"winner_{number}.safetensors,loser_{number}.safetensors,prompt {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    model: Any = SimpleNamespace(latent_shape=SHAPE, device=torch.device("cpu"))
    family, orders = gradient_toy.GradientModel, []
    for seed in (0, 1):
        videos, _ = open_given_videos("x.videos", tmp_path / "pairs.csv", engine.PROMPTS, seed, family)
        orders.append([item.text for item in videos.take(0, 8)])
        for place, text in enumerate(orders[-1]):
            found = videos.latents(model, Prompt(text, NO_TEXT, place))
            assert torch.equal(found, torch.full(SHAPE, float(text.split()[1])))
    assert sorted(orders[0]) == sorted(orders[1]) == [f"prompt {number}" for number in range(8)]
    assert orders[0] != orders[1]


def test_drawn_videos_follow_the_seed_and_the_place() -> None:
    family = gradient_toy.GradientModel
    model: Any = SimpleNamespace(real_video=family.real_video, encode=lambda videos: videos)
    drawn = []
    for seed in (0, 1):
        videos, _ = open_given_videos("x.videos", None, engine.PROMPTS, seed, family)
        drawn += [videos.latents(model, Prompt("red", NO_TEXT, place)) for place in (0, 1)]
    assert len({video.numpy().tobytes() for video in drawn}) == 4
