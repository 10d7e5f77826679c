"""VBench's arithmetic and preprocessing against numbers of the public code (vbench_arith.json)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from reference import FOLDER, facts, tensor

from vpo_engine.metrics.vbench import arithmetic, pixels
from vpo_engine.metrics.vbench.dimensions import aesthetic_ratings, head_from_weights
from vpo_engine.metrics.video_metric import mean

VBENCH = facts("vbench_arith")


def cases(*path: str) -> list[Any]:
    found = VBENCH
    for key in path:
        found = found[key]
    return list(found)


@pytest.mark.parametrize("case", cases("temporal_flickering", "cases"), ids=lambda case: case["frames"])
def test_flicker(case: dict[str, Any]) -> None:
    video = tensor("vbench_arith", case["frames"])
    assert arithmetic.flicker_score(video) == pytest.approx(case["score"], abs=1e-6)
    if "mae_per_step" in case:
        steps = [arithmetic.pixel_change(before, after) for before, after in pairwise(video)]
        assert steps == pytest.approx(case["mae_per_step"], rel=1e-6)


@pytest.mark.parametrize(
    "case", cases("motion_smoothness_arithmetic", "cases"), ids=lambda case: case["frames"]
)
def test_frames_against_foretold_ones(case: dict[str, Any]) -> None:
    """With an even number of frames the last one has none to be compared with."""
    video = tensor("vbench_arith", case["frames"])
    foretold = tensor("vbench_arith", case["interpolated_sequence"])[1::2]
    score = arithmetic.foretold_score(video[1::2], foretold)
    assert score == pytest.approx(case["score"], abs=1e-7)


@pytest.mark.parametrize("case", cases("dynamic_degree", "flow_scores"), ids=lambda case: case["flow"])
def test_the_strength_of_a_flow(case: dict[str, Any]) -> None:
    flow = tensor("vbench_arith", case["flow"])
    assert arithmetic.flow_strength(flow) == pytest.approx(case["top5_mean"], rel=1e-5)


@pytest.mark.parametrize("case", cases("static_filter", "flow_scores"), ids=lambda case: case["flow"])
def test_the_strength_of_a_flow_for_the_filter(case: dict[str, Any]) -> None:
    flow = tensor("vbench_arith", case["flow"])
    strength = arithmetic.flow_strength(flow, arithmetic.TOP_OF_STATIC)
    assert strength == pytest.approx(case["top2_mean"], rel=1e-5)


@pytest.mark.parametrize("case", cases("dynamic_degree", "params"))
def test_what_must_move(case: dict[str, Any]) -> None:
    assert arithmetic.motion_threshold(case["height"], case["width"]) == case["thres"]
    assert arithmetic.motion_count(case["kept_frames"]) == case["count_num"]


@pytest.mark.parametrize("case", cases("dynamic_degree", "decisions"))
def test_whether_a_video_is_dynamic(case: dict[str, Any]) -> None:
    size = (case["height"], case["width"], case["kept_frames"])
    assert arithmetic.is_dynamic(case["scores"], *size) is case["dynamic"]


@pytest.mark.parametrize("case", cases("static_filter", "decisions"))
def test_whether_a_video_is_static(case: dict[str, Any]) -> None:
    size = (case["height"], case["width"], case["frames"])
    assert arithmetic.is_static(case["scores"], *size) is case["static"]


@pytest.mark.parametrize("case", cases("dynamic_degree", "frame_interval"), ids=lambda case: str(case["fps"]))
def test_the_frames_that_are_kept(case: dict[str, Any]) -> None:
    interval = arithmetic.frame_interval(case["fps"])
    assert interval == case["interval"]
    assert list(range(51))[::interval] == case["kept_of_51"]


def test_consistency_of_features() -> None:
    """One process averages over frames, several over videos."""
    expected = VBENCH["subject_consistency_from_features"]
    frames = [arithmetic.frame_consistency(tensor("vbench_arith", name)) for name in expected["features"]]
    assert [mean(each) for each in frames] == pytest.approx(expected["per_video"], abs=1e-5)
    every = mean([value for each in frames for value in each])
    assert every == pytest.approx(expected["all_single_process_mean_over_frames"], abs=1e-5)
    assert every == pytest.approx(VBENCH["background_consistency_from_features"]["all"], abs=1e-5)
    videos = mean([mean(each) for each in frames])
    assert videos == pytest.approx(expected["all_multi_process_mean_over_videos"], abs=1e-5)


def made_pixels(name: str) -> torch.Tensor:
    if name.startswith("iq_540x960"):
        drawn = np.random.RandomState(2091).randint(0, 256, (1, 540, 960, 3))
        frames = torch.from_numpy(drawn.astype(np.uint8))
        return pixels.imaging_pixels(frames, name.removeprefix("iq_540x960_"))  # type: ignore[arg-type]
    frames = tensor("vbench_arith", "pre_frames")
    if name.startswith("iq"):
        return pixels.imaging_pixels(frames)
    make = pixels.dino_pixels if name.startswith("dino") else pixels.clip_pixels
    return make(frames, int(name[4:]))


@pytest.mark.parametrize("name", cases("preprocessing", "expected"))
def test_preprocessing(name: str) -> None:
    expected, found = VBENCH["preprocessing"]["expected"][name], made_pixels(name)
    assert list(found.shape) == expected["shape"]
    assert float(found.double().sum()) == pytest.approx(expected["sum"], rel=1e-6, abs=1e-3)
    if "l2" in expected:
        assert float(found.double().square().sum().sqrt()) == pytest.approx(expected["l2"], rel=1e-6)
    if "max" in expected:
        assert float(found.min()) == pytest.approx(expected["min"], abs=1e-5)
        assert float(found.max()) == pytest.approx(expected["max"], abs=1e-5)
    if name in ("dino32", "clip32"):
        torch.testing.assert_close(found, tensor("vbench_arith", f"pre_{name}"), rtol=0, atol=1e-5)
    if name in ("dino224", "clip224"):
        sample = tensor("vbench_arith", f"pre_{name}_sample")
        torch.testing.assert_close(found[:, :, ::16, ::16], sample, rtol=0, atol=1e-5)


def test_the_aesthetic_head() -> None:
    expected = VBENCH["aesthetic_quality_from_embeddings"]
    with np.load(FOLDER / "aesthetic_linear_l14.npz") as file:
        head = head_from_weights({key: torch.from_numpy(file[key]) for key in file.files})
    ratings = aesthetic_ratings(head, tensor("vbench_arith", "aes_embeds"))
    assert ratings.tolist() == pytest.approx(expected["per_frame_raw"], abs=1e-5)
    assert mean(ratings.tolist()) / 10 == pytest.approx(expected["video"], abs=1e-6)


@pytest.mark.parametrize("name", cases("normalisation", "rows"))
def test_the_quality_score(name: str) -> None:
    row, columns = VBENCH["normalisation"]["rows"][name], VBENCH["normalisation"]["columns"]
    raw = row["raw"] if "raw" in row else [percent / 100 for percent in row["raw_percent"]]
    values = dict(zip(columns, raw, strict=True))
    for column, expected in row["normalised_times_weight"].items():
        found = arithmetic.WEIGHTS[column] * arithmetic.normalised(column, values[column])
        assert found == pytest.approx(expected, abs=1e-9)
    assert arithmetic.quality_score(values) == pytest.approx(row["quality_score"], abs=1e-9)


def test_the_total_score() -> None:
    example = VBENCH["normalisation"]["full_example"]
    assert arithmetic.quality_score(example["raw"]) == pytest.approx(example["quality"], abs=1e-9)
    assert arithmetic.semantic_score(example["raw"]) == pytest.approx(example["semantic"], abs=1e-9)
    assert arithmetic.total_score(example["raw"]) == pytest.approx(example["total"], abs=1e-9)


def test_a_score_needs_all_of_its_dimensions() -> None:
    raw = dict(VBENCH["normalisation"]["full_example"]["raw"])
    del raw["imaging quality"]
    with pytest.raises(ValueError, match="needs all of its 7 dimensions, imaging quality missing"):
        arithmetic.quality_score(raw)
