"""DEVIL's arithmetic against numbers of the public code (devil.json), and its parts as metrics."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from reference import facts, smooth_video, tensor

from vpo_engine.metrics import devil
from vpo_engine.metrics.networks.raft import Raft
from vpo_engine.metrics.registry import build_metric, metric_card
from vpo_engine.metrics.video_metric import mean, measure_record

DEVIL = facts("devil")


@pytest.mark.parametrize("case", DEVIL["segment_dino"]["cases"], ids=lambda case: case["features"])
def test_change_over_time(case: dict[str, Any]) -> None:
    features = tensor("devil", case["features"])
    if case["score"] is None:
        with pytest.raises(ValueError, match="needs at least 8 frames, got 6"):
            devil.autocorrelation_distance(features)
    else:
        assert devil.autocorrelation_distance(features) == pytest.approx(case["score"], abs=1e-5)


def test_change_over_time_of_tokens() -> None:
    case = DEVIL["segment_dino_tokens"]
    found = devil.autocorrelation_distance(tensor("devil", case["features"]))
    assert found == pytest.approx(case["score"], abs=1e-5)


@pytest.mark.parametrize("case", DEVIL["segment_split"]["cases"], ids=lambda case: str(case["frames"]))
def test_the_frames_of_segments(case: dict[str, Any]) -> None:
    assert devil.segment_frames(case["frames"], case["ratio"]) == case["after_resample_to_8"]
    length = len(case["segments"][0])
    if length <= 8:
        found = devil.segment_frames(case["frames"], case["ratio"], length)
        assert found == case["segments"]


def test_features_of_segments_and_of_frames() -> None:
    segments, frames = DEVIL["segment_viclip"], DEVIL["video_level_variance"]
    found = devil.segment_dissimilarity(tensor("devil", segments["features"]))
    assert found == pytest.approx(segments["score"], abs=1e-5)
    found = devil.variance_around_mean(tensor("devil", frames["features"]))
    assert found == pytest.approx(frames["score"], abs=1e-5)


def test_the_strength_of_flows() -> None:
    case = DEVIL["flow_strength"]
    assert devil.flow_magnitude(tensor("devil", case["flow"])) == pytest.approx(case["score"], rel=1e-6)


def test_structural_similarity() -> None:
    case = DEVIL["ssim"]
    found = devil.ssim(tensor("devil", case["video"]))
    assert found.tolist() == pytest.approx(case["per_pair"], abs=1e-5)
    assert float(found.mean()) == pytest.approx(case["mean"], abs=1e-5)


def test_perceptual_hashes() -> None:
    case = DEVIL["phash"]
    hashes = [devil.perceptual_hash(frame) for frame in tensor("devil", case["frames"])]
    assert [np.packbits(bits.flatten()).tobytes().hex() for bits in hashes] == case["hex"]
    steps = [int((before != after).sum()) for before, after in pairwise(hashes)]
    assert steps == case["steps"]
    assert mean(steps) == case["mean"]


@pytest.mark.parametrize("case", DEVIL["fps"], ids=lambda case: str(case["fps"]))
def test_frames_at_eight_per_second(case: dict[str, Any]) -> None:
    assert devil.frames_at_rate(case["frames"], case["fps"], case["target"]) == case["kept"]


@pytest.mark.parametrize("case", DEVIL["resize_long_side"])
def test_the_long_side(case: dict[str, Any]) -> None:
    assert list(devil.resized_long_side(case["h"], case["w"])) == case["out"]


def regressions() -> dict[str, devil.Regression]:
    given = DEVIL["dynamics_score"]["stand_in_coefficients"]
    return {name: devil.Regression(tuple(each["w"]), each["b"]) for name, each in given.items()}


def test_the_dynamics_score() -> None:
    case = DEVIL["dynamics_score"]
    levels = devil.dynamics_levels(case["inputs"], regressions())
    np.testing.assert_allclose(list(levels.values()), case["levels"], atol=1e-9)
    np.testing.assert_allclose(
        devil.dynamics_score(case["inputs"], regressions()), case["overall"], atol=1e-9
    )
    parts = dict(case["inputs"])
    del parts["temporal_entropy"]
    with pytest.raises(ValueError, match="needs temporal_entropy, the regression video_level; without them"):
        devil.dynamics_score(parts, {k: v for k, v in regressions().items() if k != "video_level"})


def test_range_and_controllability() -> None:
    case = DEVIL["dynamics_range"]
    assert devil.dynamics_range(case["scores"]) == pytest.approx(case["value"], abs=1e-12)
    case = DEVIL["dynamics_controllability"]
    found = devil.dynamics_controllability(case["scores"], case["grades"])
    assert found == pytest.approx(case["value"], abs=1e-12)
    with pytest.raises(ValueError, match="all prompts have the same grade"):
        devil.dynamics_controllability([0.1, 0.2], [1, 1])


def test_grades_of_names() -> None:
    case = DEVIL["grades_from_names"]
    assert [devil.grade_of_name(name) for name in case["names"]] == case["grades"]


def test_quality_by_dynamics() -> None:
    """Empty ranges count 0, and a score of exactly 1 is in none."""
    case = DEVIL["dynamics_based_quality"]
    ranges = devil.quality_by_dynamics(case["dynamics"], case["quality"])
    np.testing.assert_allclose(ranges, case["per_bin"], atol=1e-12)
    found = devil.dynamics_based_quality(case["dynamics"], case["quality"])
    assert found == pytest.approx({key: case[key] for key in found}, abs=1e-12)
    case = DEVIL["dynamics_based_quality_edges"]
    ranges = devil.quality_by_dynamics(case["dynamics"], case["quality"])
    np.testing.assert_allclose(ranges, case["per_bin"], atol=1e-12)


def test_naturalness() -> None:
    assert DEVIL["naturalness_map"] == devil.NATURALNESS


def test_its_parts_are_marked_as_partial() -> None:
    metric = build_metric("devil_frame_changes")
    moving = measure_record(metric, smooth_video(1, 6, 40, 64, 9, 5), name="moving", prompt="", fps=8)
    still = smooth_video(1, 1, 40, 64).expand(6, -1, -1, -1)
    standing = measure_record(metric, still, name="still", prompt="", fps=8)
    assert standing.values == pytest.approx({"ssim": 1.0, "phash": 0.0}, abs=1e-6)
    assert moving.values["ssim"] < 0.9
    assert moving.values["phash"] > 0
    for summary in metric.summarise([moving, standing]):
        assert summary.partial
        assert any("DEVIL's dynamics score needs seven parts" in note for note in summary.notes)
    fast = smooth_video(1, 6, 40, 64)
    with pytest.raises(ValueError, match="only 1 of the video's 6 frames is kept at 60 fps"):
        metric.measure(fast, "", 60.0)
    with pytest.raises(ValueError, match="needs 11 pixels on the shorter side"):
        metric.measure(smooth_video(1, 6, 4, 256), "", 8.0)


def test_the_flow_part_sees_levels_as_devil_gives_them() -> None:
    """Levels are 0..1 and not 0..255, at 512 pixels, at eight frames per second."""
    seen: list[torch.Tensor] = []

    class Seeing(Raft):
        def forward(self, before: torch.Tensor, after: torch.Tensor, iterations: int = 20) -> Any:
            seen.append(after)
            flow = torch.full((1, 2, *before.shape[2:]), 3.0)
            flow[:, 1] = 4.0
            return flow, flow

    metric = devil.FlowStrength(metric_card("devil_flow"), Seeing(), device=torch.device("cpu"))
    assert metric.measure(smooth_video(2, 7, 64, 100), "", 24.0).values == {"": pytest.approx(5.0)}
    assert len(seen) == 2
    assert seen[0].shape == (1, 3, 328, 512)
    assert float(seen[0].max()) <= 1
    with pytest.raises(ValueError, match="needs 121 pixels on the shorter side once the longer one has 512"):
        metric.measure(smooth_video(2, 7, 20, 100), "", 8.0)
