"""Sizes against the tables written down from Open-Sora v1.2.0."""

import json
from pathlib import Path

import pytest
import torch

from vpo_engine.config import ModelConfig
from vpo_engine.models.opensora import geometry
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.opensora.published import VAE_V1_2
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.protocols import TextEmbedding

DATA = Path(__file__).parent.parent / "data" / "opensora"
TABLE = json.loads((DATA / "aspect_table.json").read_text())
ROWS = json.loads((DATA / "latent_sizes.json").read_text())["rows"]


def test_every_pixel_size_of_the_table():
    for resolution, aspects in TABLE["sizes"].items():
        for aspect, size in aspects.items():
            assert geometry.pixel_size(resolution, aspect) == tuple(size), (resolution, aspect)


def test_the_names_are_exactly_those_of_the_table():
    assert set(geometry.RESOLUTIONS) == set(TABLE["sizes"])
    assert all(set(geometry.ASPECTS) == set(aspects) for aspects in TABLE["sizes"].values())


def test_9_16_is_landscape_with_the_nominal_pixel_count():
    for resolution, pixels in TABLE["base_pixels"].items():
        height, width = geometry.pixel_size(resolution, "9:16")
        assert width > height
        assert height * width == pixels


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    with torch.device("meta"):
        return OpenSoraVAE.from_config(VAE_V1_2)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['resolution']}-{row['num_frames']}")
def test_latents_and_decoded_size(row, vae):
    height, width, frames = row["height"], row["width"], row["num_frames"]
    assert geometry.pixel_size(row["resolution"], row["aspect"]) == (height, width)
    latent = vae.latent_size(frames, height, width)
    assert list(latent) == row["latent"]
    assert [vae.spatial_factor * side for side in latent[1:]] == row["decoded_hw"]
    assert vae.chunks(frames) == row["chunks"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['resolution']}-{row['num_frames']}")
def test_tokens_of_the_policy(row):
    with torch.device("meta"):
        network = STDiT3.from_config({"depth": 1, "hidden_size": 8, "num_heads": 2, "caption_channels": 4})
        latents, y = torch.zeros(1, 4, *row["latent"]), torch.zeros(1, 1, 1, 4)
        seen = []
        network.spatial_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
        network(latents, torch.zeros(1), y, fps=24.0, height=row["height"], width=row["width"])
    ((_, frames, patches, _),) = seen
    assert frames == row["patch_grid"][0]
    assert patches == row["tokens_per_frame"] == row["patch_grid"][1] * row["patch_grid"][2]
    assert frames * patches == row["tokens"]


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (18, 6), (20, 6), (34, 10)]
)
def test_latent_frames_of_incomplete_chunks(frames, latents, vae):
    assert vae.latent_size(frames, 64, 64)[0] == latents


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"resolution is '241p'; known: 144p, 240p, .*1080p"):
        geometry.pixel_size("241p", "9:16")
    with pytest.raises(ValueError, match=r"aspect \(height:width\) is '16/9'; known: .*9:16"):
        geometry.pixel_size("240p", "16/9")


def test_a_size_has_the_name_that_it_is_found_by():
    for resolution in geometry.RESOLUTIONS:
        for aspect in geometry.ASPECTS:
            assert geometry.named_size(*geometry.pixel_size(resolution, aspect)) == (resolution, aspect)


def test_the_network_is_told_the_size_and_frame_rate_of_the_settings():
    """In pixels as published, not in those that whole latents make."""
    settings = ModelConfig(kind="opensora", resolution="480p", aspect="9:16", num_frames=51, fps=12)
    model = OpenSora.blueprint(settings, lambda folder, published, name: dict(published), depth=1).model
    model.device = torch.device("cpu")
    assert (model.fps, model.video_size) == (12, (51, 480, 848))
    told = {}

    def network(z, t, y, mask, **named):
        told.update(named)
        return z

    text = TextEmbedding(torch.zeros(1, 2, 4096), torch.ones(1, 2, dtype=torch.bool))
    model.predict(network, torch.zeros(1, *model.latent_shape), torch.tensor([500.0]), text)
    assert told == {"fps": 12.0, "height": 480, "width": 854}
