"""Pixel measures of natural videos, on frames whose numbers are known."""

from __future__ import annotations

import pytest
import torch

from vpo_engine.metrics.pixels import pixel_measures


def test_flicker_is_the_spread_of_second_differences() -> None:
    """Levels 10, 20, 50, 60: the differences are 10, 30, 10, and theirs 20 and -20."""
    levels = torch.tensor([10, 20, 50, 60], dtype=torch.uint8).view(1, 4, 1, 1, 1)
    found = pixel_measures(levels.expand(1, 4, 5, 6, 3), ["a"])
    assert found["flicker"].item() == pytest.approx(20)
    assert found["motion"].item() == pytest.approx(50 / 3)
    assert found["sharpness"].item() == pytest.approx(0, abs=1e-4)


def test_motion_does_not_cancel() -> None:
    """What gets darker on one side gets brighter on the other."""
    videos = torch.zeros(1, 3, 5, 6, 3, dtype=torch.uint8)
    videos[0, ::2, :, :3] = videos[0, 1, :, 3:] = 100
    found = pixel_measures(videos, ["a"])
    assert found["motion"].item() == pytest.approx(100)
    assert found["flicker"].item() == pytest.approx(0, abs=1e-4)


def test_sharpness_is_the_mean_laplacian_of_the_luminance() -> None:
    """A ramp has none; a red dot counts 4 times in its place and once in each of four neighbours, of nine places."""
    ramp = (10 * torch.arange(6) + 5 * torch.arange(5).unsqueeze(1)).to(torch.uint8)
    flat = pixel_measures(ramp[None, None, :, :, None].expand(1, 3, 5, 6, 3), ["a"])
    assert flat["sharpness"].item() == pytest.approx(0, abs=1e-4)
    dot = torch.zeros(1, 3, 5, 5, 3, dtype=torch.uint8)
    dot[:, :, 2, 2, 0] = 100
    assert pixel_measures(dot, ["a"])["sharpness"].item() == pytest.approx(29.9 * 8 / 9, rel=1e-5)
