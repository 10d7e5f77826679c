"""The interface of metrics: records, summaries, provenance, and the rule of one column."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vpo_engine.metrics.provenance import Provenance, check_one_column
from vpo_engine.metrics.registry import METRICS, build_metric, metric_card, metric_names
from vpo_engine.metrics.video_metric import (
    Record,
    Summary,
    VideoMetric,
    measure_record,
    unreadable_record,
)

FLICKER = "temporal_flickering"


def noise(frames: int = 5, height: int = 12, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def record(
    metric: VideoMetric, video: Tensor, name: str = "a.mp4", prompt: str = "a cat", fps: float = 8.0
) -> Record:
    return measure_record(metric, video, name=name, prompt=prompt, fps=fps)


def number(metric: VideoMetric, *records: Record) -> Summary:
    (summary,) = metric.summarise(records)
    return summary


def test_a_number_is_the_same_after_its_records_went_through_json() -> None:
    metric = build_metric(FLICKER)
    records = [record(metric, noise(seed=seed), f"{seed}.mp4") for seed in range(3)]
    read = [Record.from_fields(json.loads(json.dumps(each.to_fields()))) for each in records]
    assert read == records
    summary = number(metric, *read)
    assert summary.value == pytest.approx(sum(each.values[""] for each in records) / 3, abs=1e-12)
    told = json.loads(json.dumps(summary.to_fields()))
    assert Provenance.from_fields(told["provenance"]) == summary.provenance


def test_a_video_that_fails_is_named_and_the_others_are_kept() -> None:
    metric = build_metric(FLICKER)
    good = record(metric, noise())
    short = record(metric, noise(frames=1), "short.mp4")
    broken = unreadable_record("broken.mp4", "a dog", ValueError("'broken.mp4' is not a readable video file"))
    assert short.error.startswith(
        "temporal_flickering needs at least 2 frames, the video has 1; give longer videos"
    )
    summary = number(metric, good, short, broken)
    assert summary.value == good.values[""]
    assert summary.partial
    assert set(summary.failed) == {"short.mp4", "broken.mp4"}
    assert any("2 of 3 videos failed: short.mp4, broken.mp4" in note for note in summary.notes)
    assert summary.provenance.count == 1
    assert number(metric, good).partial is False


def test_without_any_measured_video_there_is_no_number() -> None:
    metric = build_metric(FLICKER)
    summary = number(metric, record(metric, noise(frames=1)))
    assert summary.value is None
    assert summary.partial
    with pytest.raises(ValueError, match="no videos to summarise"):
        metric.summarise([])
    with pytest.raises(ValueError, match=r"has two records of a.mp4; keep one of each video"):
        metric.summarise([record(metric, noise())] * 2)


@pytest.mark.parametrize(
    ("video", "fps", "told"),
    [
        (torch.zeros(5, 12, 16, 3), 8.0, "uint8"),
        (torch.zeros(12, 16, 3, dtype=torch.uint8), 8.0, r"\[F, H, W, 3\]"),
        (torch.zeros(5, 3, 12, 16, dtype=torch.uint8), 8.0, r"\[F, H, W, 3\]"),
        (torch.zeros(5, 12, 16, 3, dtype=torch.uint8), 0.0, "fps is 0"),
        (torch.zeros(5, 12, 16, 3, dtype=torch.uint8), float("nan"), "fps is nan"),
    ],
)
def test_what_is_no_video_is_refused(video: Tensor, fps: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_metric(FLICKER).measure(video, "", fps)


@pytest.mark.parametrize(
    ("other", "fps", "told"),
    [
        ((5, 24, 16), 8.0, "different sizes, most 12 x 16, but odd.mp4 (24 x 16)"),
        ((7, 12, 16), 8.0, "different frame counts, most 5 frames, but odd.mp4 (7 frames)"),
        ((5, 12, 16), 24.0, "different frame rates, most 8 fps, but odd.mp4 (24 fps)"),
    ],
)
def test_videos_of_different_kinds_are_named(other: tuple[int, int, int], fps: float, told: str) -> None:
    metric = build_metric(FLICKER)
    usual = [record(metric, noise(), f"{name}.mp4") for name in "ab"]
    summary = number(metric, *usual, record(metric, noise(*other), "odd.mp4", fps=fps))
    assert any(told in note for note in summary.notes)


PROVENANCE = Provenance(
    metric="subject_consistency",
    version="1",
    backbone="DINO ViT-B/16",
    weights={"dino_vitbase16_pretrain.pth": "a" * 64},
    frames=(16,),
    fps=(8.0,),
    resolution=("240x426",),
    prompts="b" * 64,
    count=72,
    aggregation="mean over frames",
    settings={"static filter": "off"},
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"metric": "proxy_feature_consistency_pixels"},
            "metric is subject_consistency and proxy_feature",
        ),
        ({"version": "2"}, "version is 1 and 2"),
        ({"backbone": "none"}, "backbone is DINO ViT-B/16 and none"),
        (
            {"weights": {"dino_vitbase16_pretrain.pth": "c" * 64}},
            "weights is dino_vit.*pth aaaaaaaaaaaa... and dino_vit.*cccccccccccc...",
        ),
        ({"frames": (16, 17)}, "frames is 16 and 16, 17"),
        ({"fps": (24.0,)}, "fps is 8 and 24"),
        ({"resolution": ("256x256",)}, "resolution is 240x426 and 256x256"),
        ({"prompts": "d" * 64}, "prompts is bbbbbbbbbbbb... and dddddddddddd..."),
        ({"count": 71}, "count is 72 and 71"),
        ({"aggregation": "mean over videos"}, "aggregation is mean over frames and mean over videos"),
        ({"settings": {"static filter": "on"}}, "settings is static filter off and static filter on"),
    ],
)
def test_numbers_of_different_settings_do_not_share_a_column(change: dict[str, object], told: str) -> None:
    check_one_column({"base": PROVENANCE, "aligned": PROVENANCE})
    with pytest.raises(ValueError, match=f"base and new do not belong in one column: {told}"):
        check_one_column({"base": PROVENANCE, "aligned": PROVENANCE, "new": replace(PROVENANCE, **change)})


def test_the_order_of_videos_changes_no_number() -> None:
    metric = build_metric(FLICKER)
    records = [record(metric, noise(seed=seed), f"{seed}.mp4", prompt=str(seed)) for seed in range(5)]
    forth, back = number(metric, *records), number(metric, *records[::-1])
    assert forth == back


def test_every_metric_has_a_card_and_its_name_tells_its_group() -> None:
    assert {"reward:videoscore", "reward:builtin"} < set(metric_names())
    for name in (*METRICS, "reward:builtin"):
        card = metric_card(name)
        assert card.name == name
        assert card.title
        assert card.measures.endswith(".")
        assert (card.group == "vbench") == bool(card.dimension)
        assert (card.group == "proxy") == name.startswith("proxy_")
        assert (card.group == "reward") == name.startswith("reward:")
    for entry in METRICS.values():
        assert entry.card.licence or not entry.card.needs


def test_the_page_names_every_metric_with_its_weights_and_licence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name, entry in METRICS.items():
        card = entry.card
        assert f"`{name}`" in page
        for told in (*card.needs, card.licence.partition(":")[0], card.install):
            assert told in page


def test_an_unknown_metric_is_told_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'temporal_flickering'"):
        build_metric("temporal_flikering")


def test_a_reward_as_a_metric_gives_the_rewards_scores() -> None:
    from vpo_engine.rewards.registry import build_reward

    metric, reward = build_metric("reward:brisque"), build_reward("brisque")
    video = noise(9, 64, 64)
    found = metric.measure(video, "a cat", 8.0).values
    expected = reward.score(video[None], ["a cat"])
    assert found == {name: float(score[0]) for name, score in expected.items()}
    summaries = metric.summarise([record(metric, video)])
    assert [each.name for each in summaries] == [f"reward:brisque/{name}" for name in reward.dimensions]
    assert summaries[0].provenance.weights.keys() == {"parameters.safetensors"}
    with pytest.raises(ValueError, match="leave out the path"):
        build_metric("reward:builtin", weights=".")
