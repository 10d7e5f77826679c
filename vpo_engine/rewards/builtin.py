"""A reward for natural video that needs no download: picture statistics, consistency and motion.

    visual_quality        1 - BRISQUE / 100, mean over frames. Undamaged pictures have about 0.6 to 1, blurred, noisy
                          and badly compressed ones 0.2 to 0.5, pictures without texture about -0.2.
    naturalness           10 / (10 + NIQE), mean over frames: 0 to 1, in practice 0.2 to 0.5.
    temporal_consistency  how well each frame is foretold by its two neighbours along the motion between them, as
                          structural similarity: -1 to 1, a still has 1. Flicker, jitter and cuts lower it; steady
                          motion does not, up to about 5 % of the shorter side a frame.
    dynamic_degree        m / (1 + m) of the mean motion m between frames, in per cent of the shorter side: 0 to 1, a
                          still has 0. Right within an eighth up to about 10 % a frame.

The prompt is not read. Both temporal dimensions look at all frames at a shorter side of 64 pixels, so they depend
little on resolution. BRISQUE judges every damage that it knows; NIQE is the weaker of the two, and on small frames it
can prefer a noisy picture to a clean one. A policy can be trained against all of this, but these are statistics: they
know nothing of content, and optimising them alone is likely to find that out.

Letters: B videos, F frames of a video, f frames that are looked at, n pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import check_finite, check_video_pixels, check_videos, spread_frames
from vpo_engine.rewards.natural_scenes import (
    LUMA_NIQE,
    MIN_SIDE,
    PATCH,
    brisque,
    luminance,
    niqe,
    niqe_patches,
    smooth,
)
from vpo_engine.rewards.optical_flow import displace, flow_between
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos

DIMENSIONS = ("visual_quality", "naturalness", "temporal_consistency", "dynamic_degree")
PICTURES = ("visual_quality", "naturalness")
"""The dimensions that single frames are scored in."""
NEEDED_FRAMES = {"temporal_consistency": 3, "dynamic_degree": 2}
SMALL_SIDE = 64
AT_ONCE = 2**18
"""Pixels that are measured at once: small pictures cost as much alone as together."""
CARD = RewardCard(
    name="builtin",
    dimensions={
        "visual_quality": (None, None),
        "naturalness": (0.0, 1.0),
        "temporal_consistency": (-1.0, 1.0),
        "dynamic_degree": (0.0, 1.0),
    },
    frames="8 evenly spread for the pictures, all for consistency and motion",
    resolution="own for the pictures; shorter side 64 for consistency and motion",
    reads_prompt=False,
    differentiable=True,
    parameters=0,
    licence="statistics shipped with the engine: Apache-2.0 (BRISQUE), BSD-3-Clause (NIQE)",
    source="vpo_engine/rewards/builtin_data",
)
CARD_BRISQUE = replace(
    CARD,
    dimensions={"visual_quality": (None, None)},
    frames="8 evenly spread",
    resolution="own",
    licence="statistics shipped with the engine: Apache-2.0",
)
"""The card of one dimension alone, for frames too small for the others."""


class Builtin:
    """The builtin reward (a ``Reward``): deterministic, differentiable, a few kilobytes."""

    def __init__(
        self,
        *,
        dimensions: Sequence[str] = DIMENSIONS,
        frames: int | None = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        """``dimensions`` are those computed; the picture dimensions see ``frames`` frames of a video, or all for None.

        naturalness needs frames of at least 96 x 192 pixels, dynamic_degree two frames, temporal_consistency three.
        """
        unknown = [name for name in dimensions if name not in DIMENSIONS]
        if unknown or not dimensions or len(set(dimensions)) < len(dimensions):
            raise ValueError(
                f"dimensions are {list(dimensions)}, expected each once, of {', '.join(DIMENSIONS)}"
            )
        if frames is not None and frames < 1:
            raise ValueError(f"frames is {frames}, expected at least 1, or None for all")
        self.dimensions = tuple(dimensions)
        self.frames, self.device = frames, torch.device(device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dimensions: Sequence[str] = DIMENSIONS,
        frames: int | None = 8,
    ) -> Builtin:
        """Make the reward as every other is made.

        Raise ValueError for a ``path``; ``dtype`` has no effect: statistics are float64.
        """
        del dtype
        if path is not None:
            raise ValueError(
                f"the builtin reward has its parameters in the package; leave out the path {path}"
            )
        return cls(dimensions=dimensions, frames=frames, device=device)

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3] and B prompts; return {dimension: float32 [B]}, on the CPU.

        Of a file, only the frames for the pictures are held, and a few others at a time. Raise ValueError for a wrong
        shape or type, and for frames too few or too small for a dimension.
        """
        check_videos(videos, prompts)
        self._check_size(*videos.shape[1:4])
        rows = [self._measure(*self._read(videos, row)) for row in range(len(videos))]
        scores = {name: torch.cat([row[name] for row in rows]).cpu() for name in self.dimensions}
        for name, values in scores.items():
            check_finite(values, prompts, f"{name} of the builtin reward")
        return scores

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1.

        Return {dimension: float32 [B]} on their device, with gradients.
        """
        check_video_pixels(videos, prompts)
        frames, _, height, width = videos.shape[1:]
        self._check_size(frames, height, width)
        moving = small_luminance(videos) if self._looks_at_motion else None
        return self._measure(videos[:, self._places_of_pictures(frames)], moving)

    @property
    def _looks_at_motion(self) -> bool:
        return bool(set(self.dimensions) - set(PICTURES))

    def _places_of_pictures(self, num_frames: int) -> list[int]:
        return spread_frames(num_frames, self.frames) if set(PICTURES) & set(self.dimensions) else []

    def _read(self, videos: Videos, row: int) -> tuple[Tensor, Tensor | None]:
        """Return a video's pictures, floats [1, f, 3, H, W] in 0..1, and its small luminance [1, F, 1, h, w]."""
        count, height, width = videos.shape[1:4]
        places = self._places_of_pictures(count)
        if not self._looks_at_motion:
            return self._floats(videos[row : row + 1, places]), None
        # Both are made whole at the start: small tensors that stay between large ones that go would hold memory.
        pictures = torch.empty(1, len(places), 3, height, width, device=self.device)
        luma = torch.empty(1, count, 1, *small_size(height, width), device=self.device)
        for start in range(0, count, step := max(1, AT_ONCE // (height * width))):
            seen = range(start, min(start + step, count))
            frames = self._floats(videos[row : row + 1, list(seen)])
            luma[:, start : start + len(seen)] = small_luminance(frames)
            for place in set(places) & set(seen):
                pictures[:, places.index(place)] = frames[:, place - start]
        return pictures, luma

    def _floats(self, frames: Tensor) -> Tensor:
        return frames.to(self.device).permute(0, 1, 4, 2, 3).float() / 255

    def _measure(self, pictures: Tensor, luma: Tensor | None) -> dict[str, Tensor]:
        """Return {dimension: float32 [B]} of pictures [B, f, 3, H, W] and of small luminance [B, F, 1, h, w]."""
        scores = {}
        if "visual_quality" in self.dimensions:
            scores["visual_quality"] = 1 - _over_frames(brisque, pictures) / 100
        if "naturalness" in self.dimensions:
            scores["naturalness"] = 10 / (10 + _over_frames(niqe, pictures))
        if luma is not None and "temporal_consistency" in self.dimensions:
            scores["temporal_consistency"] = consistency(luma)
        if luma is not None and "dynamic_degree" in self.dimensions:
            percent = 100 * motion(luma) / min(luma.shape[3:])
            scores["dynamic_degree"] = percent / (1 + percent)
        return {name: scores[name].float() for name in self.dimensions}

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        return refusal(self._check_size, frames, height, width)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        for name, needed in NEEDED_FRAMES.items():
            if name in self.dimensions and frames < needed:
                raise ValueError(
                    f"videos have {frames} frame{'s' if frames > 1 else ''}, but {name} compares {needed} neighbouring "
                    f"ones; give longer videos, or select only {' and '.join(PICTURES)} (reward.dimensions; rank: "
                    "--reward brisque)"
                )
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"frames are {height} x {width}, expected at least {MIN_SIDE} x {MIN_SIDE} pixels"
            )
        if "naturalness" in self.dimensions and niqe_patches(height, width) < 2:
            raise ValueError(
                f"frames are {height} x {width}, but naturalness needs two patches of {PATCH} x {PATCH} pixels; give "
                "larger frames, or leave out this dimension (rank: --reward brisque)"
            )


def small_size(height: int, width: int) -> tuple[int, int]:
    """Return the size that makes a shorter side of more than 64 pixels 64."""
    factor = min(1.0, SMALL_SIDE / min(height, width))
    return round(height * factor), round(width * factor)


def small_luminance(videos: Tensor) -> Tensor:
    """Return the luminance [B, F, 1, h, w] of videos [B, F, 3, H, W], in their type.

    A shorter side of more than 64 pixels becomes 64.
    """
    batch, frames = videos.shape[:2]
    luma = luminance(videos.flatten(0, 1), LUMA_NIQE)
    size = small_size(*luma.shape[2:])
    if size != luma.shape[2:]:
        luma = F.interpolate(luma, size=size, mode="bilinear", align_corners=False, antialias=True)
    return luma.unflatten(0, (batch, frames))


def consistency(luma: Tensor) -> Tensor:
    """Measure how well its two neighbours predict each inner frame of luminance [B, F, 1, h, w] in 0..1; return [B].

    It is the mean structural similarity (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004, with ``smooth``'s window) of
    the frame and the mean of its neighbours, both moved to it along half of the motion between them. F >= 3.
    """
    triples = (luma.shape[0], luma.shape[1] - 2)
    before, here, after = (luma[:, start : start + triples[1]].flatten(0, 1) for start in range(3))
    return _in_parts(_foretold, before, here, after).unflatten(0, triples).mean(1)


def _foretold(before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """Return the structural similarity [n] of pictures [n, 1, h, w] and what their two neighbours foretell."""
    half = flow_between(before, after) / 2
    return structural_similarity(here, (displace(before, -half) + displace(after, half)) / 2)


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity, -1 to 1, [n], of pictures [n, 1, h, w] in 0..1."""
    mean_x, mean_y = smooth(x), smooth(y)
    variances = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    level = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return (level * (2 * covariance + 0.03**2) / (variances + 0.03**2)).flatten(1).mean(1)


def motion(luma: Tensor) -> Tensor:
    """Measure the motion between neighbouring frames of luminance [B, F, 1, h, w]: its mean length in pixels, [B]."""
    pairs = (luma.shape[0], luma.shape[1] - 1)
    lengths = _in_parts(_mean_length, luma[:, :-1].flatten(0, 1), luma[:, 1:].flatten(0, 1))
    return lengths.unflatten(0, pairs).mean(1)


def _mean_length(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean length [n] of the motion between pictures [n, 1, h, w], in pixels."""
    length = (flow_between(before, after).square().sum(1) + 1e-12).sqrt() - 1e-6
    return length.flatten(1).mean(1)


def _over_frames(measure: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Average a measure of images [n, 3, H, W] over frames [B, f, 3, H, W]."""
    return _in_parts(measure, pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).mean(1)


def _in_parts(measure: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Measure maps [n, C, h, w], about ``AT_ONCE`` pixels of one of them at a time; return [n]."""
    count = max(1, AT_ONCE // maps[0][0].numel())
    return torch.cat([measure(*part) for part in zip(*(each.split(count) for each in maps), strict=True)])
