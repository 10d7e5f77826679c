"""Rewards as metrics: their scores, their frame rates, and rewards of the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from reference import smooth_video
from torch import Tensor

from vpo_engine.evaluation.chosen_metrics import metric_key
from vpo_engine.metrics.registry import build_metric, metric_card
from vpo_engine.metrics.video_metric import measure_record
from vpo_engine.rewards import kinds, own


class OneRate:
    """A reward that is made for one frame rate."""

    dimensions = ("rate", "brightness")
    reads_prompt = False

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        brightness = videos.float().mean(dim=(1, 2, 3, 4))
        return {"rate": torch.full_like(brightness, self.fps), "brightness": brightness}


class OfFolder:
    """A reward with weights, which refuses some prompts and sizes."""

    dimensions = ("length",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse_prompt(self, prompt: str) -> str | None:
        return "the prompt is about a dog" if "dog" in prompt else None

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        return "the video is too wide" if width > 50 else None

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"length": torch.full((len(videos),), float(videos.shape[1]))}


VIDEO = smooth_video(1, 5, 24, 32)


def test_a_reward_for_one_rate_takes_that_of_the_first_video() -> None:
    metric = build_metric("reward:test_reward_metrics:OneRate")
    assert metric.card.needs == ()
    first = measure_record(metric, VIDEO, name="a", prompt="", fps=12.0)
    assert first.values == {"rate": 12.0, "brightness": pytest.approx(float(VIDEO.float().mean()), rel=1e-6)}
    other = measure_record(metric, VIDEO, name="b", prompt="", fps=8.0)
    assert "is made for one frame rate, 12 of its first video, and this one has 8" in other.error
    summaries = metric.summarise([first, other])
    assert [each.name for each in summaries] == [f"{metric.card.name}/rate", f"{metric.card.name}/brightness"]
    assert all(each.partial and set(each.failed) == {"b"} for each in summaries)


def test_what_a_reward_refuses_is_named_and_its_weights_are_hashed(tmp_path: Path) -> None:
    name = "reward:test_reward_metrics:OfFolder"
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert metric_card(name).needs
    metric = build_metric(name, weights=tmp_path)
    assert set(metric.weights) == {"model.safetensors", "test_reward_metrics.py"}
    assert metric.measure(VIDEO, "a cat", 8.0).values == {"length": 5.0}
    with pytest.raises(ValueError, match="the prompt is about a dog"):
        metric.measure(VIDEO, "a dog", 8.0)
    with pytest.raises(ValueError, match="the video is too wide"):
        metric.measure(smooth_video(1, 5, 24, 64), "a cat", 8.0)
    with pytest.raises(ValueError, match="needs path"):
        build_metric(name)


def test_a_reward_without_its_folder_says_so_before_anything_is_read() -> None:
    with pytest.raises(
        ValueError,
        match="reward:videoscore needs a local path to its weights, published at TIGER-Lab/VideoScore",
    ):
        build_metric("reward:videoscore")
    with pytest.raises(ValueError, match="there is no reward 'videoscor'; did you mean 'videoscore'"):
        build_metric("reward:videoscor")


CHANGING = """
class Mine:
    dimensions = ("one",)
    reads_prompt = False

    def score(self, videos, prompts):
        return {{"one": {factor} * videos.float().mean((1, 2, 3, 4))}}
"""


def test_a_reward_whose_code_has_changed_is_another_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an evaluation that goes on shows what the old code found."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for factor in (1, 2):
        (tmp_path / "changing_reward.py").write_text(CHANGING.format(factor=factor))
        sys.modules.pop("changing_reward", None)
        importlib.invalidate_caches()
        keys.append(metric_key(build_metric("reward:changing_reward:Mine")))
    sys.modules.pop("changing_reward")
    assert keys[0] != keys[1]


class MayHaveFolder(OfFolder):
    """A reward that does without its weights."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path


def test_a_reward_of_an_installed_package_may_do_without_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "test_reward_metrics:MayHaveFolder", "vpo_engine.rewards")
    for reader in (own, kinds):
        monkeypatch.setattr(reader, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert build_metric("reward:mine").measure(VIDEO, "a cat", 8.0).values == {"length": 5.0}


def test_a_reward_compares_with_no_reference() -> None:
    with pytest.raises(ValueError, match="reward:brisque compares with no reference; leave out somewhere"):
        build_metric("reward:brisque", reference="somewhere")
