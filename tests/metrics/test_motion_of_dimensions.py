"""Which videos count as moving and which as still: how many pairs, and which places of a pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpo_engine.metrics.registry import build_metric, metric_card
from vpo_engine.metrics.vbench.dimensions import DynamicDegree, FilteredFlickering

SIDE = 128


def blank(frames: int) -> Tensor:
    return torch.zeros(frames, SIDE, SIDE, 3, dtype=torch.uint8)


def flow(pixels: float, share: float = 1.0) -> Tensor:
    """Return the flow of a pair of which a share of the places moves by so many pixels."""
    found = torch.zeros(2, SIDE * SIDE)
    found[0, : round(share * SIDE * SIDE)] = pixels
    return found.view(2, SIDE, SIDE)


@pytest.mark.parametrize(("moving", "dynamic"), [(4, 1.0), (3, 0.0)])
def test_a_quarter_of_the_frames_that_are_kept_must_move(moving: int, dynamic: float) -> None:
    """Of 48 frames at 24 a second 16 are kept."""
    flows = iter([flow(9.0)] * moving + [flow(0.0)] * 15)
    metric = DynamicDegree(metric_card("dynamic_degree"), lambda before, after: next(flows))
    found = metric.measure(blank(48), "", 24.0)
    assert found.values == {"": dynamic}
    assert found.details["kept frames"] == 16


@pytest.mark.parametrize(("pixels", "still"), [(1.4, True), (2.0, False)])
def test_the_filter_of_still_videos_looks_at_the_fastest_fiftieth(pixels: float, still: bool) -> None:
    """1.5 pixels are the limit at this size; three hundredths of the places move, of a twentieth too few to tell."""
    card = metric_card("temporal_flickering_filtered")
    metric = FilteredFlickering(card, lambda before, after: flow(pixels, 0.03))
    assert metric.measure(blank(16), "", 8.0).details == {"static": still}


def test_the_stand_in_for_smoothness_takes_the_mean_of_both_neighbours() -> None:
    """Those of the second frame have a mean of 20, and those of the fourth 60."""
    levels = torch.tensor([0, 10, 40, 90, 80], dtype=torch.uint8).view(-1, 1, 1, 1)
    found = build_metric("proxy_motion_smoothness_blend").measure(levels.expand(-1, 8, 8, 3), "", 8.0)
    assert found.values[""] == pytest.approx((255 - 20) / 255)
