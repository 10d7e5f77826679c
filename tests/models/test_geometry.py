"""Sizes against the tables written down from Open-Sora v1.2.0."""

import json
import math
from pathlib import Path

import pytest

from vpo_engine.models.opensora import geometry

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
    assert TABLE["num_frames_names"] == geometry.FRAMES


def test_9_16_is_landscape_with_the_nominal_pixel_count():
    for resolution, pixels in TABLE["base_pixels"].items():
        height, width = geometry.pixel_size(resolution, "9:16")
        assert width > height
        assert height * width == pixels


def test_frame_counts_by_name_number_and_digits():
    assert geometry.num_frames("4s") == 102
    assert geometry.num_frames(34) == geometry.num_frames("34") == 34


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['resolution']}-{row['num_frames']}")
def test_latents_tokens_and_decoded_size(row):
    height, width, frames = row["height"], row["width"], row["num_frames"]
    assert geometry.pixel_size(row["resolution"], row["aspect"]) == (height, width)
    latent = geometry.latent_size(frames, height, width)
    grid = geometry.patch_grid(latent)
    assert list(latent) == row["latent"]
    assert list(grid) == row["patch_grid"]
    assert [2 * grid[1], 2 * grid[2]] == row["padded_latent_hw"]
    assert math.prod(grid) == row["tokens"]
    assert grid[1] * grid[2] == row["tokens_per_frame"]
    assert round(math.sqrt(grid[1] * grid[2])) == row["base_size"]
    assert geometry.position_scale(height, width) == pytest.approx(row["pos_scale"], rel=1e-15)
    assert list(geometry.decoded_size(height, width)) == row["decoded_hw"]
    assert geometry.chunk_frames(frames) == row["chunks"]


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (18, 6), (20, 6), (34, 10)]
)
def test_latent_frames_of_incomplete_chunks(frames, latents):
    assert geometry.latent_size(frames, 64, 64)[0] == latents


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"resolution is '241p'; known: 144p, 240p, .*1080p"):
        geometry.pixel_size("241p", "9:16")
    with pytest.raises(ValueError, match=r"aspect \(height:width\) is '16/9'; known: .*9:16"):
        geometry.pixel_size("240p", "16/9")
    with pytest.raises(ValueError, match="frames is '3s'; give a number or one of 1x, 2x"):
        geometry.num_frames("3s")
    with pytest.raises(ValueError, match="frames is 0; a video needs 1 frame or more"):
        geometry.num_frames(0)
