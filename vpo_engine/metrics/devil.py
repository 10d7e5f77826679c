"""DEVIL's dynamics (Liao et al., arXiv 2407.01094; MingXiangL/DEVIL at 48556c32): its arithmetic, and two of its parts
as metrics.

The whole score cannot be made here: its three regressions lie in a pickle that is not published beside the code, its
"temporal entropy" depends on the build of x264, and naturalness is the answer of a paid model that is gone. Given
these, ``dynamics_score`` and ``dynamics_based_quality`` are the rest.

Letters: F frames of H x W pixels, D channels of a feature, N videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.networks import raft
from vpo_engine.metrics.networks.checkpoints import read_state
from vpo_engine.metrics.provenance import hash_file
from vpo_engine.metrics.video_metric import Measurement, VideoMetric, mean
from vpo_engine.metrics.weight_paths import find_weights

RATE, LONG_SIDE, BINS = 8.0, 512, 12
GRADES = ("static", "low", "medium", "very_high", "high")
"""The grades in the order in which names are searched for them."""
_GRADE_VALUES = {"static": 0, "low": 1, "medium": 2, "high": 3, "very_high": 4}
NATURALNESS = {
    "almost realistic": 1.0,
    "slightly unrealistic": 0.75,
    "moderately unrealistic": 0.5,
    "clearly unrealistic": 0.25,
    "completely fantastical": 0.0,
}
"""What the answers of the judge of naturalness count."""
_HASH, _FACTOR = 8, 4
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Regression:
    """A linear regression of one level of dynamics."""

    weights: tuple[float, ...]
    bias: float


LEVELS = {
    "inter_frame": ("flow", "ssim", "phash"),
    "inter_segment": ("dino_segm", "viclip_segm"),
    "video_level": ("info_dino", "temporal_entropy"),
}
"""The parts that each level is made of, in the order of its regression."""


class FrameChanges(VideoMetric):
    """SSIM and perceptual hashes of neighbouring frames, at eight frames per second: two of DEVIL's seven parts."""

    outputs = ("ssim", "phash")

    @classmethod
    def make(cls, card: MetricCard, weights: Path | None, device: torch.device) -> FrameChanges:
        return cls(card)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        if min(resized_long_side(height, width)) < _WINDOW:
            return (
                f"{self.card.name} needs {_WINDOW} pixels on the shorter side once the longer one has {LONG_SIDE}, the "
                f"video is {height} x {width}; leave this metric out"
            )
        return super().refuse_size(frames, height, width)

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        kept = _enough(video, fps)
        hashes = [perceptual_hash(frame) for frame in kept]
        distances = [int((before != after).sum()) for before, after in pairwise(hashes)]
        return Measurement({"ssim": mean(ssim(_long_side_pixels(kept)).tolist()), "phash": mean(distances)})


class FlowStrength(VideoMetric):
    """The mean motion between neighbouring frames by RAFT, at eight frames per second: one of DEVIL's seven parts.

    As DEVIL does, RAFT is given levels of 0..1 where it expects 0..255.
    """

    def __init__(
        self, card: MetricCard, network: raft.Raft, *, device: torch.device, **facts: object
    ) -> None:
        super().__init__(card, **facts)  # type: ignore[arg-type]
        self._network, self._device = network, device

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> FlowStrength:
        path = find_weights(weights, raft.FILE)
        network = raft.Raft.from_weights(read_state(path, raft.NAME), where=path, device=device)
        return cls(card, network, device=device, backbone=raft.NAME, weights={path.name: hash_file(path)})

    @property
    def settings(self) -> dict[str, str]:
        return {"levels": "0..1, as DEVIL gives them to RAFT"}

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        if min(resized_long_side(height, width)) < raft.LEAST_SIDE:
            return (
                f"{self.card.name} needs {raft.LEAST_SIDE} pixels on the shorter side once the longer one has "
                f"{LONG_SIDE}, the video is {height} x {width}; leave this metric out"
            )
        return super().refuse_size(frames, height, width)

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        images = raft.padded(_long_side_pixels(_enough(video, fps)).to(self._device))
        strengths = [
            flow_magnitude(self._network(before[None], after[None])[1]) for before, after in pairwise(images)
        ]
        return Measurement({"": mean(strengths)})


def frames_at_rate(count: int, fps: float, rate: float = RATE) -> list[int]:
    """Return the frames of a video that stand for it at ``rate``: every n-th, or each one repeated."""
    if fps > rate:
        return list(range(0, count, int(fps / rate)))
    return [frame for frame in range(count) for _ in range(int(rate / fps))]


def resized_long_side(height: int, width: int) -> tuple[int, int]:
    """Return height and width once the longer side has 512 pixels."""
    scale = LONG_SIDE / max(height, width)
    return (int(height * scale), LONG_SIDE) if width > height else (LONG_SIDE, int(width * scale))


def ssim(images: Tensor) -> Tensor:
    """Return the structural similarity of neighbours, float32 [F - 1], of images [F, C, H, W] in 0..1.

    A Gaussian window of 11 pixels, without padding; the mean over places and channels. H and W must be at least 11.
    """
    channels = images.shape[1]
    places = torch.arange(_WINDOW, device=images.device) - _WINDOW // 2
    window = torch.exp(-places.float().square() / (2 * _SIGMA**2))
    window = (window / window.sum()).expand(channels, 1, 1, _WINDOW)

    def blurred(maps: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(maps, window, groups=channels), window.mT, groups=channels)

    x, y = images[:-1], images[1:]
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x.square()
    variance_y = blurred(y * y) - mean_y.square()
    covariance = blurred(x * y) - mean_x * mean_y
    likeness = (2 * covariance + _K2**2) / (variance_x + variance_y + _K2**2)
    brightness = (2 * mean_x * mean_y + _K1**2) / (mean_x.square() + mean_y.square() + _K1**2)
    return (brightness * likeness).flatten(1).mean(dim=1)


def perceptual_hash(frame: Tensor) -> np.ndarray:
    """Return the 8 x 8 bits of imagehash's phash of a frame, uint8 [H, W, 3]."""
    side = _HASH * _FACTOR
    grey = Image.fromarray(frame.cpu().numpy()).convert("L").resize((side, side), Image.Resampling.LANCZOS)
    places = np.arange(side)
    cosines = 2 * np.cos(np.pi * np.outer(places[:_HASH], 2 * places + 1) / (2 * side))
    low = cosines @ np.asarray(grey, dtype=np.float64) @ cosines.T
    return low > np.median(low)


def flow_magnitude(flow: Tensor) -> float:
    """Return the mean magnitude of flows [B, 2, H, W]."""
    return float(flow.float().square().sum(dim=1).sqrt().mean())


def autocorrelation_distance(features: Tensor) -> float:
    """Return how much frames change over time, of features [F, ..., D], averaged over lags F // 8 to F - 1.

    Raise ValueError for fewer than 8 frames, for which the public code has no lag to begin with.
    """
    frames = len(features)
    if frames < 8:
        raise ValueError(f"DEVIL's segment score needs at least 8 frames, got {frames}; give longer videos")
    normed = F.normalize(features.float(), dim=-1)
    lags = range(frames // 8, frames)
    return mean([abs(1 - float((normed[:-lag] * normed[lag:]).sum(-1).mean())) for lag in lags])


def segment_frames(count: int, share: float = 0.25, size: int = 8) -> list[list[int]]:
    """Return the frames of each segment, ``size`` of them, of a video of ``count`` frames cut into shares.

    A last segment that is too short repeats its frames. Raise ValueError for a video too short for one frame each.
    """
    length = int(count * share)
    if length < 1:
        raise ValueError(
            f"a video of {count} frames has no segments of a share of {share:g}; give longer videos"
        )
    segments = []
    for start in range(0, count, length):
        found = list(range(start, min(start + length, count)))
        repeats = 1 if len(found) == length else length // len(found) + 1
        found = [frame for frame in found for _ in range(repeats)][:length]
        if length > size:
            found = [found[int(place)] for place in torch.linspace(0, length - 1, size)]
        segments.append(found + [found[-1]] * (size - len(found)))
    return segments


def segment_dissimilarity(features: Tensor) -> float:
    """Return 1 minus the mean cosine of all pairs of segments, of features [S, D]; each is paired with itself too."""
    normed = F.normalize(features.float(), dim=-1)
    above = torch.ones(len(normed), len(normed), dtype=torch.bool, device=normed.device).triu()
    return 1 - float((normed @ normed.T)[above].mean())


def variance_around_mean(features: Tensor) -> float:
    """Return how far frames are from their mean, of features [F, D]: the mean of 1 minus the cosine."""
    normed = F.normalize(features.float(), dim=-1)
    return float((1 - F.cosine_similarity(normed.mean(dim=0, keepdim=True), normed, dim=-1)).mean())


def dynamics_levels(
    parts: Mapping[str, Sequence[float]], regressions: Mapping[str, Regression]
) -> dict[str, np.ndarray]:
    """Return the three levels of dynamics, [N] each in 0..1, of the seven parts of N videos.

    Raise ValueError where a part or a regression is missing.
    """
    wanted = [part for names in LEVELS.values() for part in names]
    missing = [part for part in wanted if part not in parts] + [
        f"the regression {level}" for level in LEVELS if level not in regressions
    ]
    if missing:
        raise ValueError(
            f"DEVIL's dynamics score needs {', '.join(missing)}; without them only its single parts can be shown"
        )
    levels = {}
    for level, names in LEVELS.items():
        values = np.stack([np.asarray(parts[name], dtype=np.float64) for name in names], axis=1)
        regression = regressions[level]
        levels[level] = np.clip(values @ np.asarray(regression.weights) + regression.bias, 0, 1)
    return levels


def dynamics_score(parts: Mapping[str, Sequence[float]], regressions: Mapping[str, Regression]) -> np.ndarray:
    """Return the dynamics scores [N] of the seven parts: the mean of the three levels."""
    return np.mean(list(dynamics_levels(parts, regressions).values()), axis=0)


def dynamics_range(scores: Sequence[float]) -> float:
    """Return the distance of the 99th to the 1st percentile of dynamics scores."""
    low, high = np.percentile(np.asarray(scores, dtype=np.float64), (1, 99))
    return float(high - low)


def dynamics_controllability(scores: Sequence[float], grades: Sequence[int]) -> float:
    """Return how well dynamics follow the prompts' grades: of each video the share of videos of other grades that are
    ordered as their grades are, averaged. Raise ValueError where all grades are the same."""
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(grades)
    if len(set(wanted.tolist())) < 2:
        raise ValueError(
            "all prompts have the same grade of dynamics, so nothing can be ordered; give prompts of several grades"
        )
    shares = []
    for score, grade in zip(values, wanted, strict=True):
        other = wanted != grade
        shares.append(float(((score - values[other]) * (grade - wanted[other]) > 0).mean()))
    return mean(shares)


def grade_of_name(name: str) -> int:
    """Return the grade of dynamics that a file's name tells, 0 (static, or none in the name) to 4 (very high)."""
    return next((_GRADE_VALUES[grade] for grade in GRADES if grade in name.lower()), 0)


def quality_by_dynamics(scores: Sequence[float], quality: Sequence[float]) -> np.ndarray:
    """Return the mean quality in each of twelve equal ranges of dynamics, [12]; 0 where there is no video.

    As in the public code, a dynamics score of exactly 1 is in none of them.
    """
    edges = np.linspace(0, 1, BINS + 1)
    places = np.digitize(np.asarray(scores, dtype=np.float64), edges)
    values = np.asarray(quality, dtype=np.float64)
    return np.array(
        [values[places == place].mean() if (places == place).any() else 0.0 for place in range(1, BINS + 1)]
    )


def dynamics_based_quality(scores: Sequence[float], quality: Sequence[float]) -> dict[str, float]:
    """Return quality averaged over ranges of dynamics: overall, and of the low, middle and high third of them.

    DEVIL takes the mean over motion smoothness, naturalness, subject and background consistency, times 100.
    """
    ranges = quality_by_dynamics(scores, quality)
    third = BINS // 3
    parts = {"overall": ranges, "low": ranges[:third], "mid": ranges[third:-third], "high": ranges[-third:]}
    return {name: float(values.mean()) for name, values in parts.items()}


def _long_side_pixels(frames: Tensor) -> Tensor:
    images = frames.permute(0, 3, 1, 2).float() / 255
    size = resized_long_side(*frames.shape[1:3])
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def _enough(video: Tensor, fps: float) -> Tensor:
    """Return the frames at DEVIL's rate. Raise ValueError for fewer than two."""
    kept = video[frames_at_rate(len(video), fps)]
    if len(kept) < 2:
        raise ValueError(
            f"only {len(kept)} of the video's {len(video)} frames is kept at {fps:g} fps, where DEVIL looks at "
            f"{RATE:g} frames per second; give longer videos"
        )
    return kept
