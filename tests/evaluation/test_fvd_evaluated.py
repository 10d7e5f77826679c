"""FVD through the command: a network from its published file name, a reference folder, and one number for each arm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_case import PROMPTS, results_of, run, videos

from vpo_engine.metrics.fvd import videomae_pixels
from vpo_engine.metrics.networks.vision_transformer import VIDEOMAE_FILE, VideoMaeNetwork
from vpo_engine.runs.video import read_video

WIDTH, HEADS = 32, 16
LAYERS = {
    "attn.q_bias": (WIDTH,),
    "attn.v_bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (48, WIDTH),
    "mlp.fc1.bias": (48,),
    "mlp.fc2.weight": (WIDTH, 48),
    "mlp.fc2.bias": (WIDTH,),
}


def published_file(folder: Path) -> Path:
    """Write random weights under the published keys and name, with the classifier that is left out."""
    shapes = {
        "patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        "fc_norm.weight": (WIDTH,),
        "fc_norm.bias": (WIDTH,),
        "head.weight": (174, WIDTH),
        "head.bias": (174,),
        **{f"blocks.0.{key}": shape for key, shape in LAYERS.items()},
    }
    random = torch.Generator().manual_seed(5)
    weights = {key: torch.randn(shape, generator=random) / 4 for key, shape in shapes.items()}
    folder.mkdir()
    torch.save({"module": weights}, folder / VIDEOMAE_FILE)
    return folder


def features(folder: Path, weights: Path) -> np.ndarray:
    """Return the features of a folder's videos, in which nothing has to be cut."""
    state = torch.load(weights / VIDEOMAE_FILE, weights_only=True)["module"]
    network = VideoMaeNetwork.from_weights(state, heads=HEADS)
    rows = []
    for path in sorted(folder.glob("*.mp4")):
        clip = read_video(path)[0][:16].permute(0, 3, 1, 2).float() / 255
        clip = torch.nn.functional.interpolate(clip, (128, 128), mode="bilinear", antialias=True)
        seen = (clip * 255).to(torch.uint8).permute(0, 2, 3, 1)
        rows.append(network(videomae_pixels(seen[None]))[0].double().numpy())
    return np.stack(rows)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Frechet distance of two sets of features by the eigenvalues of the product of covariances."""
    one, two = (np.cov(rows, rowvar=False) for rows in (first, second))
    roots = np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real.sum()
    gap = first.mean(0) - second.mean(0)
    return float(gap @ gap + np.trace(one) + np.trace(two) - 2 * roots)


@pytest.mark.long
def test_fvd_of_two_arms_against_a_folder_of_real_videos(tmp_path: Path) -> None:
    weights = published_file(tmp_path / "weights")
    mine, theirs = (
        videos(tmp_path / name, light, PROMPTS[:3], 1) for name, light in (("mine", 150), ("theirs", 90))
    )
    real, out = videos(tmp_path / "real", 160, count=1), tmp_path / "out"
    words = ["--metrics", "fvd_videomae", "--weights", f"fvd_videomae={weights}", "--reference", str(real)]
    assert run(mine, "--baseline", theirs, *words, "--out", out) == 0
    entry = results_of(out)["measures"]["fvd_videomae"]
    expected = {
        "policy": distance(features(mine, weights), features(real, weights)),
        "baseline": distance(features(theirs, weights), features(real, weights)),
    }
    for role, value in expected.items():
        assert entry[role]["value"] == pytest.approx(value, rel=1e-3, abs=1e-3)
        assert entry[role]["provenance"]["count"] == 3
        assert entry[role]["others"] == {"videos": 3, "reference videos": 4}
        assert any("singular" in note for note in entry[role]["notes"])
    assert abs(expected["policy"] - expected["baseline"]) > 0.02 * expected["baseline"]
    assert "comparison" not in entry
    before = json.dumps(results_of(out)["measures"])
    assert run(mine, "--baseline", theirs, *words, "--out", out) == 0
    assert json.dumps(results_of(out)["measures"]) == before


def test_one_video_is_too_few_for_a_distance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = published_file(tmp_path / "weights")
    mine = videos(tmp_path / "mine", 150, PROMPTS[:1], count=1)
    real, out = videos(tmp_path / "real", 160, PROMPTS[:2], count=1), tmp_path / "out"
    words = ["--metrics", "fvd_videomae", "--weights", f"fvd_videomae={weights}", "--reference", str(real)]
    code = run(mine, *words, "--out", out)
    entry = results_of(out)["measures"]["fvd_videomae"]
    assert entry["policy"]["value"] is None
    assert any("needs at least 2 videos, there are 1" in note for note in entry["policy"]["notes"])
    assert code == 1
    said = capsys.readouterr().out
    assert "PARTIAL" in said
    assert "needs at least 2 videos, there are 1" in " ".join(said.split())
