"""The arithmetic of VBench's dimensions, where no network is needed (Vchitect/VBench at 45e79ec1).

Letters: F frames of H x W pixels, D channels of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.metrics.video_metric import mean

LEVELS = 255
RATE = 8
"""The frames per second at which motion is judged."""
TOP_OF_FLOW, TOP_OF_STATIC = 0.05, 0.02
"""The shares of the largest motions that count for dynamic degree, and for the filter of static videos."""


def flicker_score(video: Tensor) -> float:
    """Return how little neighbouring frames of a video, uint8 [F, H, W, 3] with F >= 2, differ; 1 is no change."""
    return _likeness(pixel_change(before, after) for before, after in pairwise(video))


def foretold_score(frames: Iterable[Tensor], foretold: Iterable[Tensor]) -> float:
    """Return how near frames are to those that were foretold, uint8 [H, W, 3]; 1 is equal.

    For motion smoothness they are a video's odd frames, and those made between its even ones; with an even number of
    frames nothing is made for the last one, which is not used.
    """
    return _likeness(pixel_change(*pair) for pair in zip(frames, foretold, strict=False))


def pixel_change(before: Tensor, after: Tensor) -> float:
    """Return the mean absolute difference of two frames, uint8 [H, W, 3], in levels."""
    return float((before.short() - after.short()).abs().sum(dtype=torch.int64)) / before.numel()


def _likeness(changes: Iterable[float]) -> float:
    return (LEVELS - mean(list(changes))) / LEVELS


def frame_interval(fps: float) -> int:
    """Return n where every n-th frame is kept for dynamic degree."""
    return max(1, round(fps / RATE))


def flow_strength(flow: Tensor, share: float = TOP_OF_FLOW) -> float:
    """Return the mean of the largest magnitudes of a flow [2, H, W], a ``share`` of all pixels.

    Raise ValueError where it is not finite, which would pass for rest in every comparison.
    """
    magnitudes = flow.float().square().sum(dim=0).sqrt().flatten()
    count = max(1, int(share * len(magnitudes)))
    strength = float(magnitudes.topk(count).values.mean())
    if not math.isfinite(strength):
        raise ValueError(
            "the optical flow is not finite; the network's weights are damaged: fetch them again"
        )
    return strength


def motion_threshold(height: int, width: int) -> float:
    """Return the pixels that a pair of frames must move by for dynamic degree."""
    return 6.0 * (min(height, width) / 256.0)


def motion_count(kept_frames: int) -> int:
    """Return how many pairs must move for a video to be dynamic; halves are rounded to even, as Python does."""
    return round(4 * (kept_frames / 16.0))


def is_dynamic(strengths: Sequence[float], height: int, width: int, kept_frames: int) -> bool:
    """Return whether a video is dynamic, of the flow strengths of its pairs in order, up to where that is certain.

    With three kept frames no pair or one must move; with two, any pair is enough.
    """
    if not strengths:
        return False
    moving = sum(strength > motion_threshold(height, width) for strength in strengths)
    return moving >= motion_count(kept_frames)


def is_static(strengths: Sequence[float], height: int, width: int, frames: int) -> bool:
    """Return whether VBench keeps a video for temporal flickering.

    ``strengths``: of the pairs of neighbours in order, then of (first, last) and (last, first), with TOP_OF_STATIC.
    """
    threshold = 3.0 * (min(height, width) / 256.0)
    allowed = round(2 * (frames / 16.0))
    moving = sum(strength > threshold for strength in strengths[:-2])
    return moving <= allowed and all(each <= threshold * allowed * 2 for each in strengths[-2:])


def frame_consistency(features: Tensor) -> list[float]:
    """Return for each frame but the first how alike it is to the one before and to the first, of features [F, D]."""
    normed = F.normalize(features.float(), dim=-1)
    before = F.cosine_similarity(normed[1:], normed[:-1]).clamp(min=0)
    first = F.cosine_similarity(normed[1:], normed[:1]).clamp(min=0)
    return ((before.double() + first.double()) / 2).tolist()


RANGES = {
    "subject consistency": (0.1462, 1.0),
    "background consistency": (0.2615, 1.0),
    "temporal flickering": (0.6293, 1.0),
    "motion smoothness": (0.706, 0.9975),
    "dynamic degree": (0.0, 1.0),
    "aesthetic quality": (0.0, 1.0),
    "imaging quality": (0.0, 1.0),
}
"""The least and greatest values of the dimensions of quality, by which the leaderboard normalises them."""
WEIGHTS = {name: 0.5 if name == "dynamic degree" else 1.0 for name in RANGES}
SEMANTIC_RANGES = {
    "object class": (0.0, 1.0),
    "multiple objects": (0.0, 1.0),
    "human action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance style": (0.0009, 0.2855),
    "temporal style": (0.0, 0.364),
    "overall consistency": (0.0, 0.364),
}
"""The same of the dimensions of semantics, which the engine does not measure; they all weigh 1."""
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


def normalised(name: str, value: float) -> float:
    """Return a dimension's value (0..1) on the leaderboard's scale; low values go below 0. ``name`` has spaces."""
    low, high = (RANGES | SEMANTIC_RANGES)[name]
    return (value - low) / (high - low)


def quality_score(values: dict[str, float]) -> float:
    """Return VBench's quality score of the seven dimensions' values (0..1), by their names with spaces.

    Raise ValueError where one is missing: a score of fewer is no VBench score.
    """
    _check_complete(values, RANGES, "quality")
    parts = [WEIGHTS[name] * normalised(name, values[name]) for name in RANGES]
    return math.fsum(parts) / math.fsum(WEIGHTS.values())


def semantic_score(values: dict[str, float]) -> float:
    """Return VBench's semantic score of its nine dimensions' values. Raise ValueError where one is missing."""
    _check_complete(values, SEMANTIC_RANGES, "semantic")
    return mean([normalised(name, values[name]) for name in SEMANTIC_RANGES])


def total_score(values: dict[str, float]) -> float:
    """Return VBench's total score of all sixteen dimensions. Raise ValueError where one is missing."""
    weighted = QUALITY_WEIGHT * quality_score(values) + SEMANTIC_WEIGHT * semantic_score(values)
    return weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def _check_complete(values: dict[str, float], expected: dict[str, tuple[float, float]], score: str) -> None:
    missing = [name for name in expected if name not in values]
    if missing:
        raise ValueError(
            f"VBench's {score} score needs all of its {len(expected)} dimensions, {', '.join(missing)} missing; "
            "measure these too, or show the dimensions without the score"
        )
