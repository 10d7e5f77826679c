"""Methods that follow the reward's gradient, through train(): against plain formulas, resumed, and in parts."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import gradient_toy
import pytest
import torch
from gradient_toy import GradientReward, pixel_scores, pixels_of
from safetensors.torch import save_file
from toy import SHAPE, ToyNetwork, caption_of, sampling_times, velocity

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config.methods import SecondRewardConfig
from vpo_engine.config_file import load_config
from vpo_engine.data.prompts import PromptStream
from vpo_engine.distributed.processes import Processes
from vpo_engine.refl import ReFL
from vpo_engine.rollout.given_videos import FileVideos
from vpo_engine.rollout.second_reward import SecondReward
from vpo_engine.seeding import generator, integer, normal
from vpo_engine.t2v_turbo import T2VTurbo

REFL = ("method=refl", "refl.steps=5", "refl.last_steps=3", "refl.margin=3", "refl.scale=0.1")
VIDEOS = "videos.csv"
METHODS = {
    "refl": REFL,
    "vader": ("method=vader", "vader.steps=4", "vader.last_steps=2", "vader.guidance=1.5"),
    "vader, random": ("method=vader", "vader.steps=4", "vader.random_steps=true"),
    "instructvideo": ("method=instructvideo", "instructvideo.steps=5", "prompts.train=null"),
    "t2v_turbo": ("method=t2v_turbo", "t2v_turbo.steps=8", "prompts.train=null"),
}
"""The methods with settings that make a run short; the last two start from given videos."""


def make_config(folder: Path, *settings: str) -> Config:
    """The configuration of a run in ``folder``/run; methods that start from videos have three, as latents."""
    method = settings[0].partition("=")[2]
    given: tuple[str, ...] = ()
    if method in ("instructvideo", "t2v_turbo"):
        folder.mkdir(parents=True, exist_ok=True)
        rows = ["winner,loser,prompt"]
        for number, prompt in enumerate(engine.PROMPTS[:3]):
            names = [f"{number}_{kind}.safetensors" for kind in (0, 1)]
            for kind, name in enumerate(names):
                random = torch.Generator().manual_seed(2 * number + kind)
                save_file({"latents": torch.randn(*SHAPE, generator=random)}, folder / name)
            rows.append(f"{names[0]},{names[1]},{prompt}")
        (folder / VIDEOS).write_text("\n".join(rows) + "\n")
        given = (f"{method}.videos={folder / VIDEOS}",)
    return engine.make_config(folder, *gradient_toy.SETTINGS, *settings, *given)


def train(config: Config) -> engine.Recording:
    return engine.train(config, GradientReward())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_step_of_refl_is_the_formula(tmp_path: Path, guidance: float) -> None:
    """One Euler loop without gradient to the drawn step, x0 = x_t + t v, and the mean of relu(margin - reward)."""
    gradient_toy.check_formulas()
    config = make_config(tmp_path, *REFL, "steps=1", f"refl.guidance={guidance}")
    train(config)
    [row] = engine.metrics_of(tmp_path / "run")

    network, prompts = ToyNetwork(), PromptStream(engine.PROMPTS, config.seed).take(0, 4)
    model = build_model(config, Processes.start("cpu"))
    model.prepare([prompt.text for prompt in prompts])
    captions = caption_of(model.embed([prompt.text for prompt in prompts]))
    x = torch.cat([normal((1, *SHAPE), config.seed, "rollout", place) for place in range(4)])
    late = 2 + integer(3, config.seed, "refl", 0)
    times = sampling_times(5)
    for step in range(late):
        x = x + velocity(network, x, torch.full((4,), times[step]), captions, guidance).detach() / 5
    t = times[late]
    clean = x + t / 1000 * velocity(network, x, torch.full((4,), t), captions, guidance)
    scores = torch.stack(
        [
            pixel_scores(*each)
            for each in zip(pixels_of(clean), (prompt.text for prompt in prompts), strict=True)
        ]
    )
    rewards = (scores[:, 0] + 3 * scores[:, 2]) / 4
    losses = 0.1 * torch.relu(3 - rewards)
    assert 0 < int((losses > 0).sum()) < 4, "some are beyond the margin, and some are not"
    losses.mean().backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm()

    assert row["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["reward/selected"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert row["reward/temporal_consistency"] == pytest.approx(float(scores[:, 1].mean()), rel=1e-5)
    assert "pairs" not in row
    assert "reference_age" not in row


def test_refl_draws_its_step_anew_in_every_step(tmp_path: Path) -> None:
    config = make_config(tmp_path, *REFL, "steps=3")
    late = [stop.stop for _, settings, stop, _ in train(config).sampled if settings.steps == 5]
    assert late == [2 + integer(3, config.seed, "refl", step) for step in range(3)]
    assert len(set(late)) > 1


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_videos_of_a_file_of_pairs_are_its_winners(tmp_path: Path, seed: int) -> None:
    """They come in the order that the seed draws; ``make_config`` writes winner 2 n and loser 2 n + 1 of prompt n."""
    own = (*METHODS["instructvideo"], "instructvideo.strength=0.2", "steps=1", f"seed={seed}")
    config = make_config(tmp_path, *own)
    [noised] = [latents for _, settings, _, latents in train(config).sampled if settings.steps == 5]
    order = torch.randperm(3, generator=generator(config.seed, "given videos")).tolist()
    for place, latents in enumerate(noised):
        drawn = torch.Generator().manual_seed(2 * order[place % 3])
        expected = 0.8 * torch.randn(*SHAPE, generator=drawn)
        expected += 0.2 * normal((1, *SHAPE), config.seed, "edit", place)[0]
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, method: str) -> None:
    settings = (*METHODS[method], "steps=5", "ema.decay=0.5")
    train(make_config(tmp_path, *settings))
    run, again = tmp_path / "run", tmp_path / "again"
    for step in (1, 3):
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(run, again)
        engine.forget_after(again, step)
        train(make_config(tmp_path, *settings, f"run_dir={again}", "checkpoint.resume=true"))
        saved, expected = engine.saved_tensors(again, 5), engine.saved_tensors(run, 5)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(value, saved[name]) for name, value in expected.items())
        assert engine.metrics_of(again) == engine.metrics_of(run)
    reference = (run / "checkpoints/step_00000005/reference.safetensors").exists()
    assert reference == load_config(run / "config.yaml").card.reference


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up_to_the_same_step(tmp_path: Path, method: str) -> None:
    rows = []
    for size in ("null", "1", "3"):
        config = make_config(
            tmp_path / size, *METHODS[method], "steps=2", f"objective.micro_batch_size={size}"
        )
        train(config)
        rows.append(engine.metrics_of(tmp_path / size / "run"))
    for whole, *others in zip(*rows, strict=True):
        for other in others:
            assert other.pop("kind") == whole["kind"]
            assert other == pytest.approx({name: whole[name] for name in other}, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            ["method=refl", "refl.last_steps=41"],
            "refl.last_steps=41 are more than the 40 sampling steps (refl.st",
        ),
        (
            ["method=refl", "refl.steps=null", "refl.last_steps=13"],
            "refl.last_steps=13 are more than the 12 sampling steps (rollout.steps=12",
        ),
        (
            ["method=refl", "reference.storage=int8"],
            "reference.storage=int8 has no meaning for method=refl (ReFL)",
        ),
        (["method=refl", "rollout.candidates=3"], "rollout.candidates=3 has no meaning for method=refl"),
        (["method=refl", "processes.per_prompt=2"], "processes.per_prompt=2 has no meaning for method=refl"),
        (["method=refl", "processes.reward=true"], "method=refl excludes processes.reward=true"),
        (["method=refl", "reward.process=true"], "method=refl excludes reward.process=true"),
        (
            ["method=refl", "distributed.engine=deepspeed"],
            "method=refl excludes distributed.engine=deepspeed",
        ),
        (["method=refl", "distributed.sequence_parallel=2"], "excludes distributed.sequence_parallel=2"),
        (["method=refl", "memory.step_in_backward=true"], "memory.step_in_backward=true has no meaning"),
        (["refl.steps=3"], "refl has the settings of method=refl, but method=online_vpo runs"),
        (["method=vader", "refl.steps=3"], "refl has the settings of method=refl, but method=vader runs"),
        (["method=ppo"], "method=ppo must be one of online_vpo, offline_dpo, refl"),
        (["method=vader", "vader.last_steps=31"], "vader.last_steps=31 are more than the 30 sampling steps"),
        (["method=vader", "reward.kind=unified_reward", "reward.path=."], "set another reward.kind"),
        (
            ["method=vader", "vader.frames=2"],
            "vader.frames=2 chooses frames, but reward.kind=sprites scores whole vid",
        ),
        (
            ["method=vader", "reward.kind=sprites_image", "reward.dimensions=image", "vader.frames=18"],
            "vader.frames=18 is more than the 17 frames of the model's videos; lower it",
        ),
        (
            ["method=instructvideo", "instructvideo.segments=3"],
            "instructvideo.segments=3 chooses frames, but reward.kind=sprites scores whole videos; leave it out",
        ),
        (
            ["method=instructvideo", "instructvideo.attenuation=1"],
            "instructvideo.attenuation=1.0 chooses frames, but",
        ),
        (
            ["method=instructvideo", "instructvideo.videos=/nowhere/at/all"],
            "instructvideo.videos=/nowhere/at/all is not there; give a folder of videos, a file of pairs, or a run",
        ),
        (
            ["method=t2v_turbo", "t2v_turbo.videos=.", "prompts.train=x.txt"],
            "prompts.train=x.txt has no meaning for method=t2v_turbo",
        ),
        (["method=t2v_turbo", "t2v_turbo.frames=2"], "t2v_turbo.frames=2 chooses frames, but"),
        (
            [
                "method=vader",
                "reward.kind=sprites_image",
                "reward.dimensions=image",
                "reward.frame_reduce=segments",
            ],
            "reward.frame_reduce=segments chooses frames of whole videos, but vader scores a few frames",
        ),
        (
            ["method=vader", "vader.second={kind: sprites_image}"],
            "vader.second.kind=sprites_image and reward.kind=sprites score single frames and whole videos",
        ),
        (
            ["method=t2v_turbo", "t2v_turbo.second={kind: sprites, dimensions: [image]}"],
            "t2v_turbo.second: unknown reward dimension 'image'",
        ),
        (
            ["method=t2v_turbo", "reference.refresh_every=3"],
            "reference.refresh_every=3 has no meaning for method=t2v",
        ),
        (["method=instructvideo", "instructvideo.strength=1.5"], "instructvideo.strength"),
        (
            ["method=vader", "vader.second={kind: unified_reward, path: .}"],
            "vader.second.kind=unified_reward passes no gradient; set another one, or vader.second=null",
        ),
    ],
)
def test_what_a_method_cannot_do_is_refused_at_the_start(
    settings: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([*settings, f"run_dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_settings_of_the_file_that_a_method_does_not_use_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the shipped file, beta and K; the same in a file that names the method itself is refused, by its line."""
    config = load_config(None, ["method=refl"])
    assert config.objective.beta == 500
    assert {"objective.beta", "reference.refresh_every", "rollout.candidates"} <= set(config.left_out)
    own = tmp_path / "own.yaml"
    own.write_text("method: refl\nreference:\n  refresh_every: 10\n")
    with pytest.raises(ValueError, match=r"reference.refresh_every=10 has no meaning .*own.yaml:3"):
        load_config(own)


def test_a_reward_without_gradients_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, *REFL, "reward.kind=toy:ToyReward")
    with pytest.raises(
        ValueError, match=r"method=refl follows .* but reward.kind=toy:ToyReward has none; set"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_family_without_gradients_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, *REFL, "model.kind=engine:RecordingModel")
    with pytest.raises(
        ValueError, match=r"method=refl sends the gradient .* \(toy\) does not support; set method"
    ):
        train(config)


@pytest.mark.parametrize("seed", [1, 2])
def test_refl_draws_its_steps_and_its_noise_by_the_seed(tmp_path: Path, seed: int) -> None:
    config = make_config(tmp_path, *REFL, "steps=4", f"seed={seed}")
    found = [(stop.stop, noise) for _, own, stop, noise in train(config).sampled if own.steps == 5]
    assert [late for late, _ in found] == [2 + integer(3, seed, "refl", step) for step in range(4)]
    for step, (_, noise) in enumerate(found):
        places = range(4 * step, 4 * step + 4)
        expected = torch.cat([normal((1, *SHAPE), seed, "rollout", place) for place in places])
        assert torch.equal(noise, expected)


@pytest.mark.parametrize("seed", [1, 2])
def test_vader_draws_how_many_steps_it_trains_by_the_seed(tmp_path: Path, seed: int) -> None:
    config = make_config(tmp_path, *METHODS["vader, random"], "vader.steps=6", "steps=3", f"seed={seed}")
    stops = [stop.stop for _, own, stop, _ in train(config).sampled if own.steps == 6]
    assert stops == [6 - (1 + integer(6, seed, "vader", step)) for step in range(3)]


class Timed(GradientReward):
    """A reward that is made for one frame rate, and scores no videos of any size."""

    def __init__(self, fps: float) -> None:
        super().__init__()
        self.rate = fps

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        return f"at {self.rate:g} fps {frames} frames of {height} x {width} are too small"


def test_a_second_reward_is_asked_for_the_size_and_told_the_rate_of_the_videos() -> None:
    model: Any = SimpleNamespace(device=torch.device("cpu"), fps=8, video_size=(17, 32, 48))
    message = (
        r"vader\.second\.kind=test_methods:Timed does not score the model's videos: "
        "at 8 fps 17 frames of 32 x 48 are too small"
    )
    with pytest.raises(ValueError, match=message):
        SecondReward("vader.second", SecondRewardConfig(kind="test_methods:Timed"), model)


def test_a_second_reward_of_single_frames_needs_its_frames() -> None:
    second = "t2v_turbo.second={kind: sprites_image, dimensions: [image]}"
    model: Any = SimpleNamespace(video_size=(3, 32, 32))
    config = load_config(None, ["method=t2v_turbo", second])
    with pytest.raises(
        ValueError, match=r"t2v_turbo\.second\.kind=sprites_image scores 5 frames .* have 3; raise"
    ):
        T2VTurbo.check(config, model)
    model.video_size = (5, 32, 32)
    T2VTurbo.check(config, model)


@pytest.mark.parametrize("method", ["instructvideo", "t2v_turbo"])
def test_given_videos_are_kept_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Other runs in the same folder find them there."""
    folders: list[Path] = []
    monkeypatch.setattr(FileVideos, "encode", lambda self, model, folder, *_: folders.append(folder))
    train(make_config(tmp_path, *METHODS[method], "steps=1"))
    assert folders == [tmp_path / "encoded_videos"]


@pytest.mark.parametrize(("method", "kind"), [("refl", ReFL), ("t2v_turbo", T2VTurbo)])
def test_a_signal_is_followed_before_the_next_micro_batch_and_the_step_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: Any
) -> None:
    """Of four videos, one after the other, two have been learned from when it comes."""
    learn, calls = kind.learn_from, list[Any]()

    def asked(self: Any, prompts: Any) -> Any:
        calls.append(prompts)
        found = learn(self, prompts)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(kind, "learn_from", asked)
    config = make_config(tmp_path, *METHODS[method], "steps=2", "objective.micro_batch_size=1")
    engine.train(config, GradientReward(), exit_code=143)
    assert len(calls) == 2
    assert not engine.metrics_of(tmp_path / "run")
