"""Metrics of the engine's own videos: pixel measures, and the sprites world's judge, which is never trained against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vpo_engine.data.sprites.assets import WEIGHTS
from vpo_engine.data.sprites.measure import MEASURES
from vpo_engine.data.sprites.measure import measure as measure_sprites
from vpo_engine.data.sprites.world import FRAMES, SIZE
from vpo_engine.evaluation.chosen_metrics import JUDGE, PIXELS
from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.pixels import pixel_measures
from vpo_engine.metrics.provenance import hash_file
from vpo_engine.metrics.video_metric import Measurement, Record, VideoMetric, mean
from vpo_engine.rewards.sprites import SpritesJudge

MEAN = "mean"
"""The output of a reward beside its dimensions."""
Measures = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]


class MetricOfMeasures(VideoMetric):
    """A metric of a function that returns its outputs, {name: float32 [B]}, of videos uint8 [B, F, H, W, 3]."""

    def __init__(
        self,
        card: MetricCard,
        measures: Measures,
        outputs: Sequence[str],
        *,
        sprites: bool,
        backbone: str = "none",
        weights: Mapping[str, str] | None = None,
    ) -> None:
        """``sprites``: whether it takes clips of the sprites world, in which each pixel may have become a square."""
        super().__init__(card, backbone=backbone, weights=weights)
        self._measures, self._sprites = measures, sprites
        self.outputs = tuple(outputs)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        if self._sprites and (frames != FRAMES or height != width or height % SIZE):
            return (
                f"{self.card.name} takes clips of the sprites world, {FRAMES} frames of {SIZE} x {SIZE} pixels or of a "
                f"multiple, not {frames} of {height} x {width}; leave this metric out"
            )
        return super().refuse_size(frames, height, width)

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        clip = smaller(video) if self._sprites else video
        found = self._measures(clip.unsqueeze(0), [prompt])
        return Measurement({name: float(found[name][0]) for name in self.outputs})


class Adapted(VideoMetric):
    """Another metric, on clips of the sprites world in their own pixels, or with the mean of its outputs too."""

    def __init__(self, metric: VideoMetric, *, sprites: bool = False, mean: bool = False) -> None:
        super().__init__(metric.card, backbone=metric.backbone, weights=metric.weights)
        self._metric, self._sprites = metric, sprites
        self.aggregation = metric.aggregation
        self.outputs = (MEAN, *metric.outputs) if mean else metric.outputs

    @property
    def settings(self) -> Mapping[str, str]:
        own = {"pixels": f"averaged to {SIZE} x {SIZE}"} if self._sprites else {}
        return {**self._metric.settings, **own}

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        size = (SIZE, SIZE) if self._sprites and height == width and not height % SIZE else (height, width)
        return self._metric.refuse_size(frames, *size)

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        found = self._metric.measure(smaller(video) if self._sprites else video, prompt, fps)
        if MEAN not in self.outputs:
            return found
        return Measurement({MEAN: mean(list(found.values.values())), **found.values}, found.details)

    def _chosen(self, good: Sequence[Record]) -> tuple[Sequence[Record], list[str]]:
        return self._metric._chosen(good)

    def _aggregate(
        self, output: str, records: Sequence[Record]
    ) -> tuple[float | None, dict[str, float], list[str]]:
        return self._metric._aggregate(output, records)


def adapted(metric: VideoMetric, sprites: bool) -> VideoMetric:
    """Return a metric as an evaluation uses it. sprites: whether the videos are clips of the sprites world."""
    group = metric.card.group
    mean_too = group == "reward" and len(metric.outputs) > 1
    in_own_pixels = group == "proxy" and sprites
    return Adapted(metric, sprites=in_own_pixels, mean=mean_too) if mean_too or in_own_pixels else metric


def build_engine_metric(card: MetricCard) -> VideoMetric:
    """Make a metric of ``chosen_metrics.OF_THE_ENGINE``."""
    if card.name == PIXELS:
        return MetricOfMeasures(card, pixel_measures, ("motion", "flicker", "sharpness"), sprites=False)
    if card.name == JUDGE:
        judge, file = SpritesJudge(), WEIGHTS / f"{SpritesJudge.kind}.safetensors"
        return MetricOfMeasures(
            card,
            judge.score,
            judge.dimensions,
            sprites=True,
            backbone="sprites judge",
            weights={file.name: hash_file(file)},
        )
    return MetricOfMeasures(card, measure_sprites, tuple(MEASURES), sprites=True)


def smaller(video: Tensor) -> Tensor:
    """Return a clip of the sprites world [F, 32, 32, 3] of one whose pixels are squares, by the mean of each.

    Videos of other sizes stay as they are.
    """
    if video.shape[1] != video.shape[2] or video.shape[1] % SIZE or video.shape[1] == SIZE:
        return video
    squares = video.unflatten(2, (SIZE, -1)).unflatten(1, (SIZE, -1))  # [F, SIZE, n, SIZE, n, 3]
    return squares.float().mean(dim=(2, 4)).round().to(torch.uint8)
