"""Encoding videos: the formulas of diffusers' pipelines for each family, and the files of a preference file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_pixels import FAMILIES, models  # noqa: F401  # the fixture of the tiny models
from torch import Tensor

from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.rollout.preferred_files import FilePairs
from vpo_engine.runs.video import write_mp4
from vpo_engine.video_model import VideoModel

ALONE = Processes(0, 1, torch.device("cpu"))


def video_of(model: Any, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, *model.video_size, 3), dtype=torch.uint8, generator=random)


def channels(config: Any, name: str) -> Tensor:
    values = config[name] if isinstance(config, dict) else getattr(config, name)
    return torch.as_tensor(values).view(1, -1, 1, 1, 1)


def expected_of(family: str, model: Any, pixels: Tensor) -> Tensor:
    """Latents of pixels [B, 3, F, H, W] from -1 to 1, as the pipelines of diffusers make them."""
    if family == "sprites":
        return model.vae.encode(pixels, sample=False)
    mode, config = model.vae.encode(pixels).latent_dist.mode(), model.vae.config
    if family == "cogvideox":
        return mode * config.scaling_factor
    if family == "wan":
        return (mode - channels(config, "latents_mean")) / channels(config, "latents_std")
    mean, deviation = model.vae.latents_mean.view(1, -1, 1, 1, 1), model.vae.latents_std.view(1, -1, 1, 1, 1)
    return (mode - mean) * config.scaling_factor / deviation


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_those_of_the_pipelines(family: str, models: dict[str, Any]) -> None:  # noqa: F811
    """The inverse of a scale in float32 differs by a few roundings of numbers below about ten."""
    model = models[family]
    videos = torch.cat([video_of(model, seed) for seed in (0, 1)])
    found = model.encode(videos)
    assert found.dtype == torch.float32
    assert tuple(found.shape[1:]) == model.latent_shape
    assert not found.requires_grad
    with torch.no_grad():
        parts = [
            expected_of(family, model, video[None].movedim(4, 1).float() / 127.5 - 1) for video in videos
        ]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-5)


# --- video files, for the sprites world -------------------------------------------------------------------


@pytest.fixture
def sprites(models: dict[str, Any]) -> Any:  # noqa: F811
    return models["sprites"]


@pytest.fixture
def file(tmp_path: Path, sprites: Any) -> Path:
    for name, seed in (("a.mp4", 3), ("b.mp4", 4)):
        write_mp4(tmp_path / name, sprites.decode(torch.randn(1, *sprites.latent_shape) * (seed / 4))[0], 8)
    path = tmp_path / "pairs.csv"
    path.write_text("winner,loser,prompt\na.mp4,b.mp4,a red circle\nb.mp4,a.mp4,a blue square\n")
    return path


def encoded(file: Path, model: VideoModel, cache: Path) -> tuple[FilePairs, list[str]]:
    said: list[str] = []
    pairs = FilePairs(file)
    pairs.encode(model, cache, ALONE, said.append)
    return pairs, said


def test_videos_are_encoded_once_and_found_again_by_their_content(
    file: Path, sprites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that ``sample`` enlarged are read in their own size; another name of the same file is the same video."""
    cache = tmp_path / "cache"
    _, said = encoded(file, sprites, cache)
    assert said == [f"encoding 2 of 2 videos of {file}; they are kept in {cache}"]
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")
    file.write_text("winner,loser,prompt\nc.mp4,b.mp4,a red circle\n")
    with monkeypatch.context() as patch:
        patch.delattr(OpenSora, "to_latents")
        _, said = encoded(file, sprites, cache)
    assert said == []
    changed = sprites.vae.scale.clone()
    sprites.vae.scale *= 2  # another VAE
    try:
        _, said = encoded(file, sprites, cache)
    finally:
        sprites.vae.scale.copy_(changed)
    assert len(said) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def shorter(path: Path) -> None:
    write_mp4(path, torch.zeros(16, 32, 32, 3, dtype=torch.uint8), 8)


def larger(path: Path) -> None:
    write_mp4(path, torch.zeros(17, 64, 64, 3, dtype=torch.uint8), 8, min_side=64)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (cut, "line 2: .*b.mp4"),
        (shorter, "line 2: .*b.mp4 has 16 frames of 32 x 32 pixels, but .* 17 frames of 32 x 32 pixels"),
        (larger, "line 2: .*b.mp4 has 17 frames of 64 x 64 pixels, but"),
        (lambda path: path.write_text("no video"), "line 2: .*b.mp4"),
    ],
)
def test_a_video_that_cannot_be_taken_is_named_with_its_line(
    file: Path, sprites: Any, tmp_path: Path, spoil: Callable[[Path], object], text: str
) -> None:
    spoil(tmp_path / "b.mp4")
    with pytest.raises(ValueError, match=rf"pairs.csv, {text}"):
        encoded(file, sprites, tmp_path / "cache")


def test_a_family_that_does_not_encode_asks_for_latents(
    file: Path, sprites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(OpenSora, "to_latents")
    with pytest.raises(ValueError, match=r"line 2: .* does not encode videos"):
        encoded(file, sprites, tmp_path / "cache")


def test_processes_share_the_videos(
    file: Path, sprites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr(
        "vpo_engine.rollout.preferred_files._encoded",
        lambda model, path, place: made.append(path.name) or torch.zeros(1),
    )
    for rank in range(2):
        member = Processes(rank, 2, torch.device("cpu"))
        FilePairs(file).encode(sprites, tmp_path / str(rank), member, lambda line: None)
    assert made == ["a.mp4", "b.mp4"]


def test_a_process_that_comes_late_still_encodes_its_share(
    file: Path, sprites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so whatever the first one has written by then."""
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    cache = tmp_path / "cache"
    for rank in range(2):
        FilePairs(file).encode(sprites, cache, Processes(rank, 2, torch.device("cpu")), lambda line: None)
    assert len(list(cache.glob("*.safetensors"))) == 2
