"""VBench's dimensions and the stand-ins as metrics: what they look at, how numbers are made, what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import recipe_weights, smooth_video
from torch import Tensor, nn

from vpo_engine.metrics.registry import METRICS, build_metric, check_metric, metric_card
from vpo_engine.metrics.vbench.dimensions import (
    AestheticQuality,
    DynamicDegree,
    FilteredFlickering,
    ImagingQuality,
    MotionSmoothness,
    SubjectConsistency,
    VbenchDimension,
)
from vpo_engine.metrics.video_metric import Record, VideoMetric, measure_record

CPU = torch.device("cpu")
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


def record(
    metric: VideoMetric, video: Tensor, name: str = "a", prompt: str = "a cat", fps: float = 8.0
) -> Record:
    return measure_record(metric, video, name=name, prompt=prompt, fps=fps)


def grey(*levels: int, side: int = 128) -> Tensor:
    """Return a video of blank frames of these levels."""
    frames = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    return frames.expand(-1, side, side, 3).contiguous()


def test_the_seven_dimensions_have_vbenchs_own_names() -> None:
    for name in DIMENSIONS:
        assert metric_card(name).dimension == name
        assert metric_card(name).group == "vbench"
    assert metric_card("temporal_flickering_filtered").dimension == "temporal_flickering"


def test_no_stand_in_is_a_dimension() -> None:
    for name, entry in METRICS.items():
        if entry.card.group == "proxy":
            assert not isinstance(build_metric(name), VbenchDimension)
            assert not entry.card.dimension


def test_subject_consistency_averages_over_frames_and_names_the_mean_over_videos() -> None:
    """A long video counts more than a short one, as in VBench's one process."""

    def features(pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) + torch.tensor([0.0, 1.0, 2.0])

    metric = SubjectConsistency(metric_card("subject_consistency"), features, device=CPU)
    long, short = (
        record(metric, smooth_video(1, 20, 24, 32), "long"),
        record(metric, grey(0, 255, side=24), "short"),
    )
    assert long.values[""] != pytest.approx(short.values[""], abs=0.01)
    (summary,) = metric.summarise([long, short])
    expected = (19 * long.values[""] + short.values[""]) / 20
    assert summary.value == pytest.approx(expected, abs=1e-9)
    both = (long.values[""] + short.values[""]) / 2
    assert summary.others["mean over videos"] == pytest.approx(both, abs=1e-9)
    scaled = (expected - 0.1462) / (1 - 0.1462)
    assert summary.others["on the leaderboard's scale"] == pytest.approx(scaled, abs=1e-9)
    assert summary.provenance.aggregation == "mean over frames"


def test_motion_smoothness_makes_the_odd_frames_of_the_even_ones() -> None:
    """With six frames the last one is not looked at; what the network makes is truncated to bytes by its adapter."""
    seen: list[tuple[int, int]] = []

    def between(before: Tensor, after: Tensor) -> Tensor:
        seen.append((int(before[0, 0, 0]), int(after[0, 0, 0])))
        return (before.short() + after.short()).div(2, rounding_mode="floor").to(torch.uint8)

    metric = MotionSmoothness(metric_card("motion_smoothness"), between)
    found = metric.measure(grey(0, 10, 40, 50, 80, 255), "", 8.0)
    assert seen == [(0, 40), (40, 80)]
    assert found.values[""] == pytest.approx((255 - (10 + 10) / 2) / 255, abs=1e-12)
    with pytest.raises(ValueError, match="motion_smoothness needs at least 3 frames, the video has 2"):
        metric.measure(grey(0, 1), "", 8.0)
    with pytest.raises(ValueError, match="needs at least 113 pixels on the shorter side"):
        metric.measure(grey(0, 1, 2, side=112), "", 8.0)


@pytest.mark.parametrize(
    ("fps", "kept"),
    [(8.0, [0, 1, 2, 3, 4, 5]), (12.0, [0, 2, 4]), (24.0, [0, 3])],
)
def test_dynamic_degree_looks_at_eight_frames_per_second(fps: float, kept: list[int]) -> None:
    seen: list[int] = []

    def flow(before: Tensor, after: Tensor) -> Tensor:
        seen.extend((int(before[0, 0, 0]), int(after[0, 0, 0])))
        return torch.zeros(2, 128, 128)

    metric = DynamicDegree(metric_card("dynamic_degree"), flow)
    metric.measure(grey(0, 1, 2, 3, 4, 5), "", fps)
    if fps < 24:
        assert sorted(set(seen)) == kept
    with pytest.raises(ValueError, match="only 1 of the video's 6 frames is kept at 60 fps"):
        metric.measure(grey(0, 1, 2, 3, 4, 5), "", 60.0)


@pytest.mark.parametrize(("pixels", "dynamic"), [(3.0, False), (3.001, True)])
def test_dynamic_degree_is_the_share_of_videos_above_the_threshold(pixels: float, dynamic: bool) -> None:
    """At 128 pixels 3 are not enough, by a strict comparison, in a quarter of 16 frames."""

    def flow(before: Tensor, after: Tensor) -> Tensor:
        found = torch.zeros(2, 128, 128)
        found[0, :10] = pixels  # more than a twentieth of all places
        return found

    metric = DynamicDegree(metric_card("dynamic_degree"), flow)
    still = DynamicDegree(metric_card("dynamic_degree"), lambda before, after: torch.zeros(2, 128, 128))
    first, second = record(metric, grey(*range(16)), "a"), record(still, grey(*range(16)), "b")
    assert first.values[""] == float(dynamic)
    assert metric.video_result(first) is dynamic
    (summary,) = metric.summarise([first, second])
    assert summary.value == float(dynamic) / 2


def test_the_filter_keeps_up_to_five_still_videos_of_each_prompt() -> None:
    """A video is still if what is darkest in it stays; the first five by name count."""

    def flow(before: Tensor, after: Tensor) -> Tensor:
        moved = float(int(before[0, 0, 0]) > 100)
        return torch.full((2, 128, 128), 50 * moved)

    metric = FilteredFlickering(metric_card("temporal_flickering_filtered"), flow)
    still = [record(metric, grey(0, n, 0, n), f"a-{n}", "a cat") for n in range(7)]
    moving = record(metric, grey(200, 200, 200, 200), "b-0", "a dog")
    (summary,) = metric.summarise([*still[::-1], moving])
    expected = sum(each.values[""] for each in still[:5]) / 5
    assert summary.value == pytest.approx(expected, abs=1e-12)
    assert "VBench's filter of still videos kept 5 of 8" in summary.notes
    assert any("no video of 1 prompts is still, for example 'a dog'" in note for note in summary.notes)
    assert summary.provenance.count == 8
    unfiltered = build_metric("temporal_flickering")
    assert unfiltered.settings != metric.settings
    (nothing,) = metric.summarise([moving])
    assert nothing.value is None


def test_aesthetic_quality_is_a_tenth_of_the_mean_rating() -> None:
    head = nn.Linear(768, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 5.5)
    seen: list[int] = []

    def features(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        assert pixels.shape[1:] == (3, 224, 224)
        return torch.ones(len(pixels), 768)

    metric = AestheticQuality(metric_card("aesthetic_quality"), features, head, device=CPU)
    assert metric.measure(smooth_video(1, 20, 24, 40), "", 8.0).values[""] == pytest.approx(0.55)
    assert sum(seen) == 20
    assert metric.measure(smooth_video(1, 1, 24, 40), "", 8.0).values[""] == pytest.approx(0.55)


def test_imaging_quality_shrinks_to_512_and_keeps_musiqs_own_number() -> None:
    sizes: list[tuple[int, ...]] = []

    def score(image: Tensor) -> Tensor:
        sizes.append(tuple(image.shape))
        return torch.tensor([[70.0]])

    metric = ImagingQuality(metric_card("imaging_quality"), score, device=CPU)
    found = record(metric, smooth_video(1, 2, 100, 600))
    assert sizes == [(1, 3, 85, 512)] * 2
    assert found.values[""] == pytest.approx(0.7)
    assert metric.video_result(found) == 70.0


def test_a_result_that_is_not_finite_is_no_number() -> None:
    metric = ImagingQuality(
        metric_card("imaging_quality"), lambda image: torch.tensor(float("nan")), device=CPU
    )
    found = record(metric, grey(1, 2))
    assert found.error.startswith("imaging_quality is nan for this video; its weights are damaged")


def test_a_flow_that_is_not_finite_is_not_taken_for_rest() -> None:
    def flow(before: Tensor, after: Tensor) -> Tensor:
        return torch.full((2, 128, 128), float("nan"))

    for make, name in (
        (DynamicDegree, "dynamic_degree"),
        (FilteredFlickering, "temporal_flickering_filtered"),
    ):
        found = record(make(metric_card(name), flow), grey(1, 2, 3))
        assert found.error.startswith("the optical flow is not finite")


def test_an_error_of_a_network_on_one_video_is_kept_with_its_kind() -> None:
    def score(image: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory")

    metric = ImagingQuality(metric_card("imaging_quality"), score, device=CPU)
    assert record(metric, grey(1, 2)).error == "RuntimeError: CUDA out of memory"


@pytest.mark.parametrize("name", [name for name, entry in METRICS.items() if entry.card.needs])
def test_missing_weights_are_named_at_the_start(name: str, tmp_path: Path) -> None:
    card = metric_card(name)
    options: dict[str, Any] = {}
    if card.group == "fvd":
        import numpy as np

        np.savez(tmp_path / "r.npz", raw_mean=np.zeros(2), raw_cov=np.zeros((2, 2)), num_items=3)
        options = {"reference": tmp_path / "r.npz"}
    with pytest.raises(ValueError, match=f"{name} needs a local path to {card.needs[0]}"):
        build_metric(name, **options)
    with pytest.raises(FileNotFoundError, match=f"no {card.needs[0]}"):
        build_metric(name, weights=tmp_path, **options)
    for needed in card.needs:
        (tmp_path / needed).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot be read|is not installed"):
        build_metric(name, weights=tmp_path, **options)


def test_a_metric_without_weights_takes_none() -> None:
    with pytest.raises(ValueError, match="temporal_flickering has no weights; leave out the path"):
        build_metric("temporal_flickering", weights="somewhere")
    with pytest.raises(ValueError, match="compares with no reference; leave out"):
        build_metric("temporal_flickering", reference="somewhere")


def test_a_network_of_another_size_is_no_vbench(tmp_path: Path) -> None:
    """DINO's ViT-S/16 has the same key names, and would load."""
    width, blocks = 32, "blocks.0"
    shapes = {
        "cls_token": [1, 1, width],
        "pos_embed": [1, 197, width],
        "patch_embed.proj.weight": [width, 3, 16, 16],
        "patch_embed.proj.bias": [width],
        "norm.weight": [width],
        "norm.bias": [width],
    }
    for norm in ("norm1", "norm2"):
        shapes |= {f"{blocks}.{norm}.weight": [width], f"{blocks}.{norm}.bias": [width]}
    for layer, after, before in (
        ("attn.qkv", 3 * width, width),
        ("attn.proj", width, width),
        ("mlp.fc1", 64, width),
        ("mlp.fc2", width, 64),
    ):
        shapes |= {f"{blocks}.{layer}.weight": [after, before], f"{blocks}.{layer}.bias": [after]}
    torch.save(recipe_weights(shapes, 1), tmp_path / "dino_vitbase16_pretrain.pth")
    with pytest.raises(
        ValueError, match=r"of another size \(width 32, not 768\), so its numbers would not be VBench's"
    ):
        build_metric("subject_consistency", weights=tmp_path)


def test_two_files_need_their_folder(tmp_path: Path) -> None:
    (tmp_path / "ViT-L-14.pt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no sa_0_4_vit_l_14_linear.pth in"):
        check_metric("aesthetic_quality", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is one file, .* are needed; give their folder"):
        check_metric("aesthetic_quality", tmp_path / "ViT-L-14.pt")
    (tmp_path / "sa_0_4_vit_l_14_linear.pth").write_bytes(b"x")
    check_metric("aesthetic_quality", tmp_path)


def test_a_folder_of_transformers_stands_for_an_archive_of_clip(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no ViT-B-32.pt or folder clip-vit-base-patch32 in"):
        check_metric("background_consistency", tmp_path)
    (tmp_path / "clip-vit-base-patch32").mkdir()
    (tmp_path / "clip-vit-base-patch32" / "config.json").write_text("{}")
    check_metric("background_consistency", tmp_path)
    check_metric("background_consistency", tmp_path / "clip-vit-base-patch32")


@pytest.mark.parametrize("name", ["motion_smoothness", "imaging_quality"])
def test_borrowed_networks_name_the_command_that_installs_them(name: str, tmp_path: Path) -> None:
    card = metric_card(name)
    assert "not for commercial use" in card.licence
    package = "vbench" if name == "motion_smoothness" else "pyiqa"
    assert card.install.startswith(f"pip install --no-deps {package}==")
    (tmp_path / card.needs[0]).write_bytes(b"")
    with pytest.raises(
        ValueError, match=f"the package {package}, which is not installed: pip install --no-deps"
    ):
        build_metric(name, weights=tmp_path)


BORROWED = """
import torch

class Model(torch.nn.Module):
    def __init__(self, corr_radius, corr_lvls, num_flows):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def forward(self, before, after, halfway, scale_factor, eval):
        assert before.shape[2] % 16 == before.shape[3] % 16 == 0, before.shape
        assert float(halfway) == 0.5 and scale_factor == 1.0 and eval
        return {"imgt_pred": before * (1 - halfway) + after * halfway + self.shift}
"""


def test_an_installed_package_is_used_without_its_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own import would fail here, as vbench's does without torchvision; the padding is cut off again."""
    place = tmp_path / "site" / "vbench" / "third_party" / "amt" / "networks"
    place.mkdir(parents=True)
    (place / "AMT-S.py").write_text(BORROWED)
    (tmp_path / "site" / "vbench" / "__init__.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    weights = tmp_path / "amt-s.pth"
    torch.save({"state_dict": {"shift": torch.full((1,), 2 / 255 + 1e-4)}, "epoch": 3}, weights)
    metric = build_metric("motion_smoothness", weights=weights)
    assert "vbench" not in sys.modules
    for name in [name for name in sys.modules if name.startswith("vbench.")]:
        monkeypatch.delitem(sys.modules, name)
    assert metric.backbone.startswith("AMT-S of vbench")
    video = grey(10, 20, 30, side=120)
    assert metric.measure(video, "", 8.0).values[""] == pytest.approx((255 - 2) / 255, abs=1e-12)
    odd = torch.cat([video, video.flip(0)], dim=2)[:, :113, :133]
    assert metric.measure(odd, "", 8.0).values[""] == pytest.approx((255 - 2) / 255, abs=1e-12)


class Trap:
    def __reduce__(self) -> Any:
        return (eval, ("1/0",))


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "vbench" / "third_party" / "amt" / "networks"
    place.mkdir(parents=True)
    (place / "AMT-S.py").write_text(BORROWED)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"state_dict": {"shift": torch.zeros(1)}, "config": Trap()}, tmp_path / "amt-s.pth")
    with pytest.raises(ValueError, match="If you trust the file, write its weights anew: python -c"):
        build_metric("motion_smoothness", weights=tmp_path)


def moving(step: int, frames: int = 9) -> Tensor:
    return smooth_video(7, frames, 64, 64, dx=step, dy=0)


def test_stand_ins_tell_motion_from_rest_and_order_from_disorder() -> None:
    motion = build_metric("proxy_dynamic_degree_flow")
    assert motion.measure(moving(0), "", 8.0).values[""] == 0
    assert motion.measure(moving(4), "", 8.0).values[""] == 1
    smooth, consistent = (
        build_metric(f"proxy_{name}") for name in ("motion_smoothness_blend", "feature_consistency_pixels")
    )
    shuffled = moving(3)[[0, 5, 2, 7, 4, 1, 6, 3, 8]]
    for metric in (smooth, consistent):
        assert metric.measure(moving(0), "", 8.0).values[""] == pytest.approx(1, abs=1e-6)
        ordered = metric.measure(moving(1), "", 8.0).values[""]
        assert metric.measure(shuffled, "", 8.0).values[""] < ordered
    assert consistent.measure(grey(5, 200, side=16), "", 8.0).values[""] == pytest.approx(1, abs=1e-6)


def test_the_flow_of_a_stand_in_is_named_in_its_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers with OpenCV and without it differ, and so do their backbones."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    metric = build_metric("proxy_dynamic_degree_flow")
    assert metric.backbone == "least squares over windows, coarse to fine"
    assert record(metric, moving(2)).details["flow"][0] == pytest.approx(2, abs=0.5)
