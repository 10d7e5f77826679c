"""The networks of metrics with recipe weights under published key names (model_forward.json, model_manifests.json)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import arrays, facts, recipe_weights, smooth_video
from torch import Tensor, nn

from vpo_engine.metrics.fvd import i3d_pixels, videomae_pixels
from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.networks import raft
from vpo_engine.metrics.networks.checkpoints import read_state
from vpo_engine.metrics.networks.clip_vision import clip_from_folder, clip_from_weights
from vpo_engine.metrics.networks.i3d import I3d
from vpo_engine.metrics.networks.vision_transformer import DinoNetwork, VideoMaeNetwork, sinusoid_table
from vpo_engine.metrics.registry import build_metric, metric_card
from vpo_engine.metrics.vbench import dimensions
from vpo_engine.metrics.vbench.dimensions import BackgroundConsistency, DynamicDegree, SubjectConsistency
from vpo_engine.metrics.vbench.pixels import clip_pixels, dino_pixels
from vpo_engine.metrics.weight_paths import find_weights

FORWARD, MANIFESTS = facts("model_forward"), facts("model_manifests")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def probe(found: Tensor, expected: dict[str, Any], rtol: float) -> None:
    """Compare a tensor with the numbers that stand for it."""
    assert list(found.shape) == expected["shape"]
    values = found.double().numpy()
    scale = expected["l2"]
    assert np.sqrt(np.square(values).sum()) == pytest.approx(scale, rel=rtol)
    assert np.abs(values).max() == pytest.approx(expected["absmax"], rel=rtol)
    assert values.sum() == pytest.approx(expected["sum"], rel=rtol)
    direction = np.random.RandomState(expected["probe_seed"]).standard_normal(values.shape)
    assert float((values * direction).sum()) == pytest.approx(expected["dot_probe"], abs=rtol * scale)


@pytest.fixture(scope="module")
def videomae() -> VideoMaeNetwork:
    case = FORWARD["videomae_tiny"]
    weights = recipe_weights(case["keys"], case["seed"])
    return VideoMaeNetwork.from_weights(weights, heads=case["config"]["num_heads"])


def test_videomae(videomae: VideoMaeNetwork) -> None:
    case = FORWARD["videomae_tiny"]
    clips = torch.stack([smooth_video(seed, 16, 48, 64) for seed in (3001, 3002)])
    pixels = videomae_pixels(clips)
    probe(pixels, case["preprocessed"], 1e-5)
    found = videomae(pixels)
    torch.testing.assert_close(found, torch.tensor(case["features"]), rtol=0, atol=case["tol"])


@pytest.mark.parametrize("frames", [2, 16, 18, 32])
def test_videomae_takes_other_lengths(videomae: VideoMaeNetwork, frames: int) -> None:
    """Its table of positions is then stretched over time, linearly, by 0.1 more than the ratio of lengths."""
    times = frames // 2
    scale = 1.0 if times == 8 else (times + 0.1) / 8
    table = sinusoid_table(2048, 48).unflatten(1, (8, 256))[0].double()
    for time in range(times):
        place = min(max((time + 0.5) / scale - 0.5, 0), 7)
        before = int(place)
        after = min(before + 1, 7)
        expected = table[before] + (place - before) * (table[after] - table[before])
        found = videomae._positions(times)[0].unflatten(0, (times, 256))[time]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert bool(videomae(videomae_pixels(smooth_video(3, frames, 32, 32)[None])).isfinite().all())


def test_dino_and_subject_consistency() -> None:
    case = FORWARD["dino_tiny_subject_consistency"]
    weights = recipe_weights(case["keys"], case["seed"])
    network = DinoNetwork.from_weights(weights, heads=case["config"]["num_heads"])
    video = smooth_video(3016, 5, 72, 128, dx=6, dy=3)
    features = network(dino_pixels(video))
    torch.testing.assert_close(features, torch.tensor(case["cls_features"]), rtol=0, atol=case["tol"])
    metric = SubjectConsistency(metric_card("subject_consistency"), network, device=CPU)
    assert metric.measure(video, "", 8.0).values[""] == pytest.approx(case["score"], abs=1e-5)


def test_clip_and_background_consistency() -> None:
    case = FORWARD["clip_tiny_background_consistency"]
    weights = recipe_weights(case["keys"], case["seed"])
    network = clip_from_weights(weights, heads=case["config"]["heads"])
    video = smooth_video(3021, 5, 60, 100, dx=5, dy=2)
    features = network(clip_pixels(video)).image_embeds
    torch.testing.assert_close(features, torch.tensor(case["features"]), rtol=0, atol=case["tol"])
    metric = BackgroundConsistency(
        metric_card("background_consistency"),
        lambda found: network(found).image_embeds,
        device=CPU,
    )
    assert metric.measure(video, "", 8.0).values[""] == pytest.approx(case["score"], abs=1e-5)


def test_clip_of_openais_whole_model_and_of_transformers_folder(tmp_path: Path) -> None:
    case = FORWARD["clip_tiny_background_consistency"]
    weights = recipe_weights(case["keys"], case["seed"])
    network = clip_from_weights(weights, heads=2)
    pixels = clip_pixels(smooth_video(3021, 2, 60, 100))
    expected = network(pixels).image_embeds
    whole = {f"visual.{key}": weight.half() for key, weight in weights.items()} | {
        "text_projection": torch.zeros(3, 3)
    }
    halved = clip_from_weights(whole, heads=2)(pixels).image_embeds
    torch.testing.assert_close(halved, expected, rtol=0, atol=0.02)
    from transformers import CLIPConfig

    CLIPConfig(vision_config=network.config.to_dict(), projection_dim=32).save_pretrained(tmp_path)
    saved = network.state_dict() | {"text_model.x": torch.zeros(2), "logit_scale": torch.zeros(())}
    torch.save(saved, tmp_path / "pytorch_model.bin")
    assert torch.equal(clip_from_folder(tmp_path)(pixels).image_embeds, expected)


@pytest.fixture(scope="module")
def flow_network() -> raft.Raft:
    case = FORWARD["raft"]
    return raft.Raft.from_weights(
        recipe_weights(MANIFESTS["raft_things"]["keys"], case["seed"], case["gain"])
    )


def test_raft_and_dynamic_degree(flow_network: raft.Raft) -> None:
    case, video = FORWARD["raft"], smooth_video(3006, 4, 130, 165)
    images = raft.padded(video.permute(0, 3, 1, 2).float())
    low, full = flow_network(images[:1], images[1:2])
    probe(low, case["low_res_flow"], case["rtol"])
    probe(full, case["full_res_flow_padded"], case["rtol"])
    every_second = torch.from_numpy(arrays("model_forward")[case["low_res_flow_every_2nd"]])
    torch.testing.assert_close(low[0, :, ::2, ::2], every_second, rtol=0, atol=1e-4)
    seen: list[Tensor] = []

    def flow(before: Tensor, after: Tensor) -> Tensor:
        seen.append(raft.frame_flow(flow_network, before, after))
        return seen[-1]

    metric = DynamicDegree(metric_card("dynamic_degree"), flow)
    found = metric.measure(video, "", 8.0)
    assert found.values == {"": float(case["dynamic"])}
    count = case["params"]["count_num"]
    assert found.details["flow"] == pytest.approx(case["pair_scores"][:count], rel=case["rtol"])
    assert len(seen) == count  # no pair is looked at once the video is known to be dynamic


def test_raft_sees_a_shift_at_its_least_size_and_nothing_is_nan(flow_network: raft.Raft) -> None:
    assert metric_card("dynamic_degree").least_side == raft.LEAST_SIDE
    video = smooth_video(1, 2, raft.LEAST_SIDE, raft.LEAST_SIDE)
    assert bool(raft.frame_flow(flow_network, video[0], video[1]).isfinite().all())


def test_i3d_pads_as_tensorflow_does() -> None:
    """Odd lengths are padded more behind; the numbers are those of cd-fvd's InceptionI3d with the same weights."""
    network = I3d.from_weights(recipe_weights(MANIFESTS["i3d_400"]["keys"], 1))
    pixels = i3d_pixels(smooth_video(5, 9, 40, 30)[None])
    assert pixels.shape == (1, 3, 9, 224, 224)
    found = network(pixels)
    assert found.shape == (1, 400)
    expected = [0.050084, 0.017116, -0.089261, -0.137437, -0.003284]
    assert found[0, ::80].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(find_spec("vbench") is None, reason="vbench is not installed")
def test_amt_of_vbench_and_motion_smoothness(tmp_path: Path) -> None:
    case = FORWARD["amt_s"]
    weights = recipe_weights(MANIFESTS["amt_s"]["keys"], case["seed"], case["gain"])
    torch.save({"state_dict": weights}, tmp_path / "amt-s.pth")
    metric = build_metric("motion_smoothness", weights=tmp_path)
    found = metric.measure(smooth_video(3011, 7, 128, 176), "", 8.0)
    assert found.values[""] == pytest.approx(case["motion_smoothness"], rel=case["rtol"])


@pytest.mark.skipif(find_spec("pyiqa") is None, reason="pyiqa is not installed")
def test_musiq_of_pyiqa_and_imaging_quality(tmp_path: Path) -> None:
    case = FORWARD["musiq"]
    weights = recipe_weights(MANIFESTS["musiq_spaq"]["keys"], case["seed"])
    torch.save(weights, tmp_path / "musiq_spaq_ckpt-358bb6af.pth")
    metric = build_metric("imaging_quality", weights=tmp_path)
    found = metric.measure(smooth_video(3026, 2, 90, 160), "", 8.0)
    assert found.details["raw"] == pytest.approx(case["video_result"], rel=case["rtol"])
    assert found.values[""] == pytest.approx(case["dataset_score"], rel=case["rtol"])


def meta(name: str) -> dict[str, Tensor]:
    keys = MANIFESTS[name]["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("raft_things", raft.Raft.from_weights),
        ("dino_vitb16", DinoNetwork.from_weights),
        ("clip_vit_b32_visual", clip_from_weights),
        ("clip_vit_l14_visual", clip_from_weights),
        ("i3d_400", I3d.from_weights),
        ("videomae_vit_g_ssv2", VideoMaeNetwork.from_weights),
    ],
)
def test_published_keys_are_taken(name: str, make: Callable[..., nn.Module]) -> None:
    weights = meta(name)
    network = make(weights, device="meta")
    assert sum(weight.numel() for weight in network.parameters()) > 0.99 * MANIFESTS[name]["n_params"]
    missing = dict(weights)
    dropped = next(key for key in reversed(missing) if "norm3" not in key and not key.startswith("head."))
    del missing[dropped]
    with pytest.raises(ValueError, match=r"missing|no weights"):
        make(missing, device="meta")
    with pytest.raises(ValueError, match=r"unexpected other.weight"):
        make(weights | {"other.weight": torch.empty(2, device="meta")}, device="meta")


def test_prefixes_and_wrappers_of_published_files(tmp_path: Path) -> None:
    weights = {"module.a": torch.ones(2), "module.b": torch.zeros(1)}
    torch.save(weights, tmp_path / "plain.pth")
    torch.save({"module": weights}, tmp_path / "wrapped.pth")
    for name in ("plain.pth", "wrapped.pth"):
        assert set(read_state(tmp_path / name, "X", ("model", "module"))) == {"a", "b"}
    torch.save({"epoch": 3, "other": weights}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other.pth holds no weights of X: expected tensors by name, or under model"
    ):
        read_state(tmp_path / "other.pth", "X", ("model",))


def test_an_archive_of_torchscript_is_read(tmp_path: Path) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)

    with torch.inference_mode(False):
        network = Tiny()
        torch.jit.trace(network, torch.zeros(1, 2)).save(tmp_path / "ViT-B-32.pt")
    found = read_state(tmp_path / "ViT-B-32.pt", "CLIP")
    assert torch.equal(found["visual.weight"], network.visual.weight)


def test_files_are_found_side_by_side_in_vbenchs_cache_and_by_themselves(tmp_path: Path) -> None:
    name = "raft-things.pth"
    inside = tmp_path / "raft_model" / "models" / name
    with pytest.raises(FileNotFoundError, match=r"no raft-things.pth in .*it holds nothing"):
        find_weights(tmp_path, name)
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"x")
    assert find_weights(tmp_path, name) == inside
    (tmp_path / name).write_bytes(b"y")
    assert find_weights(tmp_path, name) == tmp_path / name
    assert find_weights(inside, name) == inside
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        find_weights(tmp_path / "absent", name)


def test_a_card_names_the_files_that_are_looked_for() -> None:
    from vpo_engine.metrics.networks import borrowed, clip_vision, i3d, vision_transformer

    names = {
        "subject_consistency": vision_transformer.DINO_FILE,
        "background_consistency": clip_vision.B32_FILE,
        "aesthetic_quality": clip_vision.L14_FILE,
        "dynamic_degree": raft.FILE,
        "motion_smoothness": borrowed.AMT_FILE,
        "imaging_quality": borrowed.MUSIQ_FILE,
        "fvd_videomae": vision_transformer.VIDEOMAE_FILE,
        "fvd_i3d": i3d.FILE,
    }
    for metric, file in names.items():
        card: MetricCard = metric_card(metric)
        assert card.needs[0] == file


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("subject_consistency", "dino_vitb16"),
        ("background_consistency", "clip_vit_b32_visual"),
        ("aesthetic_quality", "clip_vit_l14_visual"),
    ],
)
def test_published_sizes_are_vbenchs_and_every_file_is_hashed(
    name: str, manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, network: str) -> dict[str, Tensor]:
        head = {"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}
        return head if path.name == dimensions.HEAD_FILE else meta(manifest)

    monkeypatch.setattr(dimensions, "read_state", read)
    for needed in metric_card(name).needs:
        (tmp_path / needed).write_bytes(b"x")
    metric = build_metric(name, weights=tmp_path, device="meta")
    assert metric.weights.keys() == set(metric_card(name).needs)


def test_another_clip_is_no_vbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimensions, "read_state", lambda path, network: meta("clip_vit_l14_visual"))
    (tmp_path / "ViT-B-32.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"of another size \(width 1024, not 768, patch 14, not 32\)"):
        build_metric("background_consistency", weights=tmp_path, device="meta")
