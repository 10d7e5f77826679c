"""Pixel measures of sprites clips, computed without any network. They serve as independent held-out measures.

A frame's background is the median colour of the picture's outermost ring of pixels. A pixel belongs to the
sprite if some channel differs from the background by more than ``CONTRAST`` levels. A frame shows a sprite if the
number of such pixels is in the range ``AREA`` (noise has more, an empty picture fewer). The sprite's position is the
centroid of these differences. A clip in which fewer than half of the frames show a sprite gets the ``worst`` value of
every measure except ``flicker``, which needs no sprite. ``blank_rate`` is the share of frames without a sprite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpo_engine.data.sprites.world import DIRECTIONS, SIZE, Attributes

CONTRAST = 24.0
"""Levels out of 255."""
AREA = (12, 400)
"""Least and most pixels of a sprite."""


@dataclass(frozen=True)
class Measure:
    """The unit of a measure, and whether more of it is better."""

    unit: str
    better: int
    """+1 if more is better, -1 if less is."""
    worst: float
    """The value of a clip without a visible sprite."""


MEASURES: dict[str, Measure] = {
    "jitter": Measure("px, mean length of the centroid's second difference", -1, SIZE / 2),
    "colour_change": Measure("chromaticity, mean distance from the clip's mean colour", -1, 0.5),
    "flicker": Measure("share, mean background change per frame over its mean brightness", -1, 1.0),
    "displacement": Measure("px over the clip along the captioned direction", +1, 0.0),
    "displacement_absolute": Measure("px over the clip in any direction", +1, 0.0),
    "sharpness": Measure("share of the contrast crossed per px at edges, 1 = a hard edge", +1, 0.0),
    "blank_rate": Measure("share of frames without a visible sprite", -1, 1.0),
}


@dataclass(frozen=True)
class _Tracks:
    """Quantities that are measured in every frame."""

    visible: Tensor  # [B, F] bool
    centre: Tensor  # [B, F, 2] px
    chroma: Tensor  # [B, F, 3] sums to 1
    edge: Tensor  # [B, F] share of the contrast crossed per px
    background: Tensor  # [B, F] mean of the background's channels, 0..255


def _ring(frames: Tensor) -> Tensor:
    """Return the outermost pixels of [B, F, H, W, 3] as [B, F, 2 * (H + W) - 4, 3]."""
    return torch.cat(
        (frames[:, :, 0], frames[:, :, -1], frames[:, :, 1:-1, 0], frames[:, :, 1:-1, -1]), dim=2
    )


def _read(videos: Tensor) -> _Tracks:
    frames = videos.float()
    background = _ring(frames).median(dim=2).values  # [B, F, 3]
    difference = (frames - background[:, :, None, None]).abs().amax(dim=4)  # [B, F, H, W]
    weight = torch.where(difference > CONTRAST, difference, 0.0)
    area = (weight > 0).sum(dim=(2, 3))
    visible = (area >= AREA[0]) & (area <= AREA[1])
    mass = weight.sum(dim=(2, 3)).clamp_min(1)
    x = (weight.sum(dim=2) * torch.arange(weight.shape[3])).sum(2) / mass
    y = (weight.sum(dim=3) * torch.arange(weight.shape[2])).sum(2) / mass
    peak = difference.amax(dim=(2, 3)).clamp_min(1)
    core = (difference >= 0.7 * peak[..., None, None]).unsqueeze(4)
    colour = (frames * core).sum(dim=(2, 3)) + 1  # with + 1 the chromaticity of black is defined
    across, along = difference.diff(dim=3).abs(), difference.diff(dim=2).abs()
    squares = across.square().sum(dim=(2, 3)) + along.square().sum(dim=(2, 3))
    edge = squares / (peak * (across.sum(dim=(2, 3)) + along.sum(dim=(2, 3))).clamp_min(1))
    return _Tracks(
        visible=visible,
        centre=torch.stack((x, y), dim=2),
        chroma=colour / colour.sum(dim=2, keepdim=True),
        edge=edge,
        background=background.mean(dim=2),
    )


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of values [B, n] over the True entries of each row; 0 for a row without any."""
    return (values * where).sum(1) / where.sum(1).clamp_min(1)


def _velocity(centre: Tensor, visible: Tensor) -> Tensor:
    """Return the least-squares velocity over the visible frames, px per frame, [B, 2]."""
    weight = visible.float().unsqueeze(2)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    time = torch.arange(centre.shape[1], dtype=torch.float32).view(1, -1, 1)
    time = time - (time * weight).sum(1, keepdim=True) / count
    return (centre * time * weight).sum(1) / (time.square() * weight).sum(1).clamp_min(1)


def measure(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Compute MEASURES of uint8 clips [B, F, H, W, 3], F >= 3, with captions of sprites: {name: float32 [B]}.

    displacement is the least-squares velocity times (F - 1), so it is exact for constant speed. jitter uses three
    consecutive frames that all show a sprite. Raise ValueError for other shapes, types or captions.
    """
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[1] < 3:
        raise ValueError(
            f"videos are {videos.dtype} {tuple(videos.shape)}, expected uint8 [B, F, H, W, 3] with F >= 3"
        )
    if len(prompts) != videos.shape[0]:
        raise ValueError(f"{len(prompts)} prompts for {videos.shape[0]} videos; give one caption for each")
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[Attributes.of(prompts).direction]
    tracks = _read(videos.cpu())
    visible = tracks.visible
    triple = visible[:, 2:] & visible[:, 1:-1] & visible[:, :-2]
    chroma = (tracks.chroma * visible.unsqueeze(2)).sum(1) / visible.sum(1, keepdim=True).clamp_min(1)
    travel = _velocity(tracks.centre, visible) * (videos.shape[1] - 1)
    step = tracks.background.diff(dim=1).abs().mean(1)
    values = {
        "jitter": _mean(tracks.centre.diff(n=2, dim=1).norm(dim=2), triple),
        "colour_change": _mean((tracks.chroma - chroma.unsqueeze(1)).norm(dim=2), visible),
        "flicker": step / tracks.background.mean(1).clamp_min(1),
        "displacement": (travel * heading).sum(1),
        "displacement_absolute": travel.norm(dim=1),
        "sharpness": _mean(tracks.edge, visible),
        "blank_rate": 1 - visible.float().mean(1),
    }
    lost = visible.sum(1) * 2 < videos.shape[1]
    for name in values.keys() - {"flicker", "blank_rate"}:
        values[name] = values[name].masked_fill(lost, MEASURES[name].worst)
    values["jitter"] = values["jitter"].masked_fill(~triple.any(1), MEASURES["jitter"].worst)
    return values
