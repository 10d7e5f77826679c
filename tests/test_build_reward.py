"""The reward of a configuration: made by name, refused before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vpo_engine import train as entry
from vpo_engine.build import blind_reward_note, build_reward, judged_dimensions
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.rewards import registry
from vpo_engine.rewards.builtin import Builtin
from vpo_engine.rewards.sprites import SpritesJudge, SpritesReward

Make = Callable[..., Config]
CPU = torch.device("cpu")


def test_sprites_and_builtin_come_with_the_package(small: Make) -> None:
    assert isinstance(build_reward(small(), CPU), SpritesReward)
    reward = build_reward(
        small("reward.kind=builtin", "reward.dimensions=naturalness", "reward.frames=3"), CPU
    )
    assert isinstance(reward, Builtin)
    assert reward.frames == 3


def test_a_run_in_which_nothing_reads_the_prompt_is_told_so(small: Make) -> None:
    assert blind_reward_note(small()) is None
    blind = "reward.kind=builtin", "reward.dimensions=global"
    note = blind_reward_note(small(*blind))
    assert note is not None
    assert "reward.kind=builtin does not read the prompt" in note
    assert "guards.reward.kind; python -m vpo_engine.rank --list" in note
    assert blind_reward_note(small(*blind, "guards.reward.kind=brisque")) == note
    assert blind_reward_note(small(*blind, "guards.reward.kind=sprites")) is None


def test_the_judge_averages_what_is_trained_on_where_it_has_that_and_else_all(small: Make) -> None:
    """None stands for the dimensions that are trained on."""
    judge, own = SpritesJudge(), ("reward.kind=builtin", "reward.dimensions=naturalness")
    assert "naturalness" not in judge.dimensions
    for dimensions in ("global", "visual_quality", "[visual_quality, text_alignment]"):
        assert judged_dimensions(small(f"reward.dimensions={dimensions}"), judge) is None
    assert judged_dimensions(small(*own), judge) == ("global",)
    assert judged_dimensions(small(*own), None) is None
    chosen = ("guards.reward.kind=sprites", "guards.reward.dimensions=[text_alignment]")
    assert judged_dimensions(small(*own, *chosen), SpritesReward()) == ("text_alignment",)


def test_everything_a_scorer_needs_reaches_it(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path, device, type, frames per second and its settings; a scorer without a setting gets none."""
    seen: dict[str, object] = {}

    def build(name: str, path: Path, **options: object) -> object:
        seen.update(name=name, path=path, **options)
        return object()

    monkeypatch.setattr(registry, "build_reward", build)
    common = (f"reward.path={tmp_path}", "reward.batch_size=2", "reward.dimensions=global")
    build_reward(small("reward.kind=videoscore_v1_1", "reward.bits=8", *common), CPU)
    assert seen == {
        "name": "videoscore_v1_1",
        "path": tmp_path,
        "device": CPU,
        "dtype": torch.float32,
        "fps": 8.0,
        "settings": {"batch_size": 2, "bits": 8},
    }
    build_reward(small("reward.kind=videoalign", *common), CPU)
    assert (seen["fps"], seen["settings"]) == (8.0, {"batch_size": 2})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["reward.kind=videoscore2", "reward.path={here}"],
            "reward.kind=videoscore2 writes its scores in words",
        ),
        (
            ["reward.kind=unified_reward", "reward.path={here}"],
            "reward.kind=unified_reward writes its scores",
        ),
        (
            ["reward.kind=videoscore", "reward.path=absent"],
            "no folder at absent; reward 'videoscore' reads the weights published at TIGER-Lab/VideoScore",
        ),
        (
            ["reward.path={here}"],
            "has no meaning for reward.kind=sprites, whose weights are in the package; leave it",
        ),
        (
            ["reward.dimensions=beauty"],
            "unknown reward dimension 'beauty'; this scorer has visual_quality, temporal_consistency,",
        ),
        (["reward.bits=8"], "reward 'sprites' has no setting bits: it takes none; leave out"),
        (
            ["reward.kind=hpsv2", "reward.path={here}", "reward.max_frames=8"],
            "reward 'hpsv2' has no setting max_frames: it takes batch_size, frames, frame_reduce, frame_decay",
        ),
    ],
)
def test_wrong_rewards_are_refused_before_anything_is_loaded(
    overrides: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("vpo_engine.training.build_model", loads)
    monkeypatch.setattr("vpo_engine.training.check_fits", loads)
    run = tmp_path / "run"
    given = [override.format(here=tmp_path) for override in overrides]
    assert entry.main([*given, f"run_dir={run}"]) == 1
    assert text in capsys.readouterr().err
    assert not run.exists()


def test_sprites_rewards_score_the_sprites_world_only() -> None:
    with pytest.raises(ValueError, match=re.escape("reward.kind sprites scores the sprites world only")):
        load_config("opensora_v1_2_240p.yaml", ["reward.kind=sprites", "reward.path=null"])


def test_a_reward_is_told_the_frame_rate_of_the_models_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(registry, "build_reward", lambda *_, **options: seen.update(options))
    words = ["reward.kind=videoalign", f"reward.path={tmp_path}", "reward.dimensions=global", "model.fps=16"]
    build_reward(load_config("opensora_v1_2_240p.yaml", words), CPU)
    assert seen["fps"] == 16
