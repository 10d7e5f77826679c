"""The Frechet distance against numbers of the public code (fvd.json), and FVD as a metric."""

from __future__ import annotations

import base64
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import arrays, facts, recipe_weights, smooth_video, tensor
from torch import Tensor

from vpo_engine.metrics import fvd
from vpo_engine.metrics.frechet import FeatureSums, frechet_distance
from vpo_engine.metrics.fvd import Fvd, prepared_clip, reference_files, videomae_pixels
from vpo_engine.metrics.networks import i3d
from vpo_engine.metrics.networks.vision_transformer import VideoMaeNetwork
from vpo_engine.metrics.provenance import check_one_column
from vpo_engine.metrics.registry import build_metric, metric_card
from vpo_engine.metrics.video_metric import Record, Summary, measure_record
from vpo_engine.runs.video import write_mp4

FVD = facts("fvd")


def sums(name: str) -> FeatureSums:
    return FeatureSums.of(arrays("fvd")[name])


@pytest.mark.parametrize("case", FVD["cases"], ids=lambda case: case["name"])
def test_distances(case: dict[str, Any]) -> None:
    """Also of singular covariances; the biased covariance is told from the unbiased one by the tolerance."""
    found = frechet_distance(sums(f"{case['name']}_real"), sums(f"{case['name']}_fake"))
    tolerance = {"rel": case["rtol"]} if "rtol" in case else {"abs": case["atol"]}
    assert found == pytest.approx(case["fvd"], **tolerance)
    swapped = frechet_distance(sums(f"{case['name']}_fake"), sums(f"{case['name']}_real"))
    assert swapped == pytest.approx(case["fvd"], **tolerance)


@pytest.mark.parametrize("case", FVD["diagonal_gaussians_closed_form"])
def test_gaussians_with_independent_channels(case: dict[str, Any]) -> None:
    both = []
    for mean, variance in ((case["mu1"], case["var1"]), (case["mu2"], case["var2"])):
        mean_, spread = np.array(mean), np.diag(variance)
        count = 1000
        both.append(FeatureSums(mean_ * count, (spread + np.outer(mean_, mean_)) * count, count))
    assert frechet_distance(*both) == pytest.approx(case["expected"], rel=1e-9)


def test_features_are_added_in_parts_up_to_a_number() -> None:
    case = FVD["streaming"]
    features = arrays("fvd")[case["features"]]
    found = FeatureSums.empty(features.shape[1])
    for start in range(0, len(features), case["chunk"]):
        found.add(features[start : start + case["chunk"]], case["max_items"])
    assert found.count == case["num_items"]
    assert np.linalg.norm(found.mean) == pytest.approx(case["mean_l2"], rel=1e-9)
    assert np.linalg.norm(found.covariance) == pytest.approx(case["cov_fro"], rel=1e-9)


@pytest.mark.parametrize("case", FVD["loader_preprocess"]["cases"])
def test_the_loader_of_clips(case: dict[str, Any]) -> None:
    video = tensor("fvd", FVD["loader_preprocess"]["video"])
    clip = prepared_clip(video, case["resolution"], case["sequence_length"], case["skip"])
    assert list(clip.shape) == case["shape_cthw"]
    assert float(clip.double().sum()) == pytest.approx(case["sum"], rel=1e-6)
    assert float(clip.double().square().sum().sqrt()) == pytest.approx(case["l2"], rel=1e-6)
    # truncated to bytes: a value at an edge may fall to either side
    assert int((clip * 255).to(torch.uint8).sum()) == pytest.approx(case["uint8_sum"], abs=20)


def test_videomae_features_and_their_distance() -> None:
    forward = facts("model_forward")
    case, expected = forward["videomae_tiny"], forward["videomae_tiny_fvd"]
    network = VideoMaeNetwork.from_weights(recipe_weights(case["keys"], case["seed"]), heads=4)
    both = []
    for first, count, dx, dy, name in (
        (3100, 10, 2, 1, "vmae_real_feats"),
        (3200, 8, 5, 3, "vmae_fake_feats"),
    ):
        clips = torch.stack([smooth_video(first + n, 16, 32, 40, dx, dy) for n in range(count)])
        found = network(videomae_pixels(clips)).numpy()
        np.testing.assert_allclose(found, arrays("model_forward")[name], rtol=0, atol=case["tol"])
        both.append(FeatureSums.of(found))
    assert frechet_distance(*both) == pytest.approx(expected["fvd"], rel=expected["rtol"])


def colours(clip: Tensor) -> Tensor:
    """Stand for a network: two channels of a clip."""
    return clip.float().mean(dim=(0, 1, 2))[:2]


def metric(reference: Path, **change: Any) -> Fvd:
    card = replace(metric_card("fvd_videomae"), **change)
    return Fvd(card, colours, 2, reference, backbone="colours", weights={"a.pth": "1" * 64})


def records(made: Fvd, count: int, frames: int = 16, first: int = 0) -> list[Record]:
    return [
        measure_record(made, smooth_video(n, frames, 24, 32), name=f"{n}.mp4", prompt="x", fps=8)
        for n in range(first, first + count)
    ]


def distance(made: Fvd, found: list[Record]) -> Summary:
    (summary,) = made.summarise(found)
    return summary


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "reference.npz"
    FeatureSums.of(np.random.RandomState(0).standard_normal((50, 2)) * 9 + 120).write(path)
    return path


def test_a_distance_is_that_of_the_features_and_says_of_how_many(npz: Path) -> None:
    made = metric(npz)
    found = records(made, 5)
    features = [np.frombuffer(base64.b64decode(each.details["feature"]), "<f4") for each in found]
    summary = distance(made, found)
    expected = frechet_distance(FeatureSums.read(npz), FeatureSums.of(np.stack(features)))
    assert summary.value == expected
    assert summary.others == {"videos": 5, "reference videos": 50}
    assert "made of 5 videos and 50 reference videos" in summary.notes
    assert summary.provenance.count == 5
    assert not any("singular" in note for note in summary.notes)
    few = distance(made, found[:2])
    assert any("with fewer than 3 videos the covariance is singular" in note for note in few.notes)
    with pytest.raises(ValueError, match="count is 5 and 2"):
        check_one_column({"five": summary.provenance, "two": few.provenance})


def test_only_the_first_frames_count(npz: Path) -> None:
    made = metric(npz)
    video = smooth_video(1, 30, 24, 32)
    assert made.measure(video, "", 8.0) == made.measure(video[:16], "", 8.0)


def test_too_few_videos_and_too_short_ones(npz: Path) -> None:
    made = metric(npz)
    summary = distance(made, [*records(made, 1), *records(made, 2, frames=15, first=1)])
    assert summary.value is None
    assert summary.partial
    assert any(
        "fvd_videomae needs at least 2 videos, there are 1; give more" in note for note in summary.notes
    )
    assert set(summary.failed) == {"1.mp4", "2.mp4"}
    assert "needs at least 16 frames, the video has 15" in summary.failed["1.mp4"]
    assert distance(made, records(made, 1)).partial
    assert made.refuse_count(1) is not None
    assert made.refuse_count(2) is None


def test_a_folder_of_videos_is_a_reference_and_its_sums_can_be_kept(tmp_path: Path) -> None:
    folder = tmp_path / "real" / "inside"
    folder.mkdir(parents=True)
    for n in range(3):
        write_mp4(folder / f"{n}.mp4", smooth_video(40 + n, 16, 32, 32), fps=8, min_side=32)
    of_folder = metric(tmp_path / "real")
    assert of_folder.reference.count == 3
    of_folder.reference.write(tmp_path / "kept.npz")
    of_file = metric(tmp_path / "kept.npz")
    found = records(of_folder, 4)
    assert distance(of_folder, found).value == distance(of_file, found).value
    digests = [made.settings["reference SHA-256"] for made in (of_folder, of_file)]
    assert digests[0] == digests[1]
    (folder / "2.mp4").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"2.mp4' is not a readable video file"):
        metric(tmp_path / "real")
    write_mp4(folder / "2.mp4", smooth_video(1, 3, 32, 32), fps=8)
    with pytest.raises(ValueError, match=r"reference video .*2.mp4': fvd_videomae needs at least 16 frames"):
        metric(tmp_path / "real")


def test_references_that_cannot_be_used_are_told_at_the_start(tmp_path: Path, npz: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has 0 videos .* needs at least 2"):
        metric(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no reference at"):
        metric(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="holds features of 2 channels, and those of X have 7"):
        Fvd(metric_card("fvd_i3d"), colours, 7, npz, backbone="X", weights={})
    np.savez(tmp_path / "other.npz", mean=np.zeros(2))
    with pytest.raises(ValueError, match="must hold raw_mean, raw_cov, num_items"):
        metric(tmp_path / "other.npz")
    np.savez(tmp_path / "odd.npz", raw_mean=np.zeros(2), raw_cov=np.zeros((3, 3)), num_items=4)
    with pytest.raises(ValueError, match=r"shapes \[2\], \[3, 3\]"):
        metric(tmp_path / "odd.npz")
    np.savez(tmp_path / "one.npz", raw_mean=np.zeros(2), raw_cov=np.zeros((2, 2)), num_items=1)
    with pytest.raises(ValueError, match="is made of 1 videos, expected at least 2"):
        metric(tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"needs a local path to vit_g_hybrid_pt_1200e_ssv2_ft.pth"):
        build_metric("fvd_videomae", reference=npz)
    with pytest.raises(ValueError, match=r"give them as a reference, a folder of videos or an .npz file"):
        build_metric("fvd_videomae", weights=tmp_path)


def test_a_pickle_is_refused_and_the_command_that_converts_it_works(tmp_path: Path, npz: Path) -> None:
    kept = FeatureSums.read(npz)
    content = {"raw_mean": kept.total, "raw_cov": kept.products, "num_items": kept.count, "max_items": None}
    path = tmp_path / "cd.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="runs code when it is read") as refused:
        metric(path)
    command = str(refused.value).split('python -c "')[1].rstrip('"')
    exec(command, {})
    assert metric(tmp_path / "cd.npz").reference.count == 50


def test_packed_sums_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("raw_cov.npy", b"")
    content = path.read_bytes()
    place = content.index(b"PK\x01\x02") + 24  # the size in the directory
    path.write_bytes(content[:place] + (3 << 30).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(ValueError, match=r"bomb\.npz has \d+ bytes and says that it holds 3221225472"):
        FeatureSums.read(path)


def test_hidden_copies_are_no_reference(tmp_path: Path) -> None:
    """Those of notebooks would count twice, and a Mac's metadata is no video; the folder itself may be hidden."""
    folder = tmp_path / ".cache"
    for name in ("0.mp4", "1.mp4", ".ipynb_checkpoints/0-checkpoint.mp4", "__MACOSX/._1.mp4", "._0.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert [path.name for path in reference_files(folder)] == ["0.mp4", "1.mp4"]


@pytest.mark.parametrize("count", [np.inf, np.nan, 50.5, "many"])
def test_a_count_that_is_none_is_refused_with_its_file(tmp_path: Path, count: object) -> None:
    np.savez(tmp_path / "sums.npz", raw_mean=np.zeros(2), raw_cov=np.zeros((2, 2)), num_items=count)
    with pytest.raises(ValueError, match=r"sums\.npz"):
        FeatureSums.read(tmp_path / "sums.npz")


def test_a_network_sees_sixteen_frames_of_256_pixels_cut_off_to_bytes(npz: Path) -> None:
    seen: list[Tensor] = []

    def features(clip: Tensor) -> Tensor:
        seen.append(clip)
        return colours(clip)

    made = Fvd(metric_card("fvd_videomae"), features, 2, npz, backbone="colours", weights={})
    video = smooth_video(1, 20, 24, 32)
    made.measure(video, "", 8.0)
    exact = prepared_clip(video, 256, 16) * 255
    assert exact.shape == (3, 16, 256, 256)
    assert torch.equal(seen[0], exact.floor().to(torch.uint8).permute(1, 2, 3, 0))


def test_i3d_sees_levels_from_minus_one_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def network(clips: Tensor) -> Tensor:
        seen.append(clips)
        return torch.zeros(1, 400)

    monkeypatch.setattr(i3d.I3d, "from_weights", lambda *_, **__: network)
    monkeypatch.setattr(fvd, "read_state", lambda *_: {})
    (tmp_path / i3d.FILE).write_bytes(b"x")
    features, width, _, _ = fvd._i3d(tmp_path, torch.device("cpu"))
    assert features(torch.zeros(16, 32, 32, 3, dtype=torch.uint8)).shape == (width,) == (400,)
    assert seen[0].shape == (1, 3, 16, 224, 224)
    assert bool((seen[0] == -1).all())
