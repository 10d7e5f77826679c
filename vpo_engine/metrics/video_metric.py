"""The interface of metrics of videos: each video is measured alone, then one number is made of all records.

So an evaluation is a stream that can stop after any video and go on later: a record is plain values.

Letters: F frames of H x W pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.provenance import Provenance, hash_prompts

_NAMED = 5
MEAN_OF_VIDEOS = "mean over videos"


@dataclass(frozen=True)
class Measurement:
    """The findings of a metric in one video: values by output, and details for ``summarise``, as plain values for JSON.

    An output's name is "" for a metric with one. A distance of sets of videos has no value for one of them.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The findings of a metric in one video, or why it found nothing, with what is known of the video.

    video: its name, for people. error: "" unless the metric failed; values and details are then empty. frames, height
    and width are 0 and fps is 0.0 where the video could not be read.
    """

    video: str
    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    values: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_fields(values: Mapping[str, Any]) -> Record:
        """Make the record of which ``to_fields`` gave the values."""
        return Record(**values)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One number made of the records of one metric.

    name: the metric's, with the output behind a slash if it has several. value: None where there is no number, for a
    reason that ``notes`` gives. failed: {video: error}. notes: sentences about what limits the number. partial: whether
    videos are left out of the number, or parts of the published metric. others: further numbers, by name.
    """

    name: str
    value: float | None
    provenance: Provenance
    failed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    partial: bool = False
    others: Mapping[str, float] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            **asdict(self),
            "notes": list(self.notes),
            "provenance": self.provenance.to_fields(),
        }


class VideoMetric(ABC):
    """The base of metrics. A subclass says what it finds in a video and, if it is no mean, how a number is made.

    backbone: the network, with the package and its version where they matter. weights: {file name: SHA-256}.
    """

    aggregation = MEAN_OF_VIDEOS
    outputs: tuple[str, ...] = ("",)

    def __init__(
        self, card: MetricCard, *, backbone: str = "none", weights: Mapping[str, str] | None = None
    ) -> None:
        self.card, self.backbone, self.weights = card, backbone, dict(weights or {})

    @property
    def settings(self) -> Mapping[str, str]:
        """Return what was chosen beside weights and videos, by name; part of the provenance."""
        return {}

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size cannot be measured, with what to do, or None if they can."""
        if frames < self.card.least_frames:
            return (
                f"{self.card.name} needs at least {self.card.least_frames} frames, the video has {frames}; give "
                "longer videos, or leave this metric out"
            )
        if min(height, width) < self.card.least_side:
            return (
                f"{self.card.name} needs at least {self.card.least_side} pixels on the shorter side, the video is "
                f"{height} x {width}; give larger videos, or leave this metric out"
            )
        return None

    def refuse_count(self, count: int) -> str | None:
        """Return why no number can be made of so many videos, with what to do, or None if one can."""
        return None

    @torch.inference_mode()
    def measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        """Measure a video, uint8 [F, H, W, 3], shown at ``fps`` frames per second.

        Deterministic. Raise ValueError, with what to do, for another shape or type, for a video that is too short or
        too small, and for a result that is not finite.
        """
        check_video(video, fps)
        if reason := self.refuse_size(*video.shape[:3]):
            raise ValueError(reason)
        found = self._measure(video, prompt, fps)
        for output, value in found.values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{output_name(self.card.name, output)} is {value} for this video; its weights are damaged or the "
                    "video is degenerate: look at the video, and fetch the weights again"
                )
        return found

    @abstractmethod
    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        """Measure a video that has been checked."""

    def summarise(self, records: Sequence[Record]) -> list[Summary]:
        """Make a number of each output from the records of all videos, in any order.

        Videos that failed are named in it, and it is marked as partial. Raise ValueError for no records at all, and
        for a video that has two.
        """
        if not records:
            raise ValueError(f"{self.card.name} has no videos to summarise; give at least one")
        twice = [name for name, count in Counter(record.video for record in records).items() if count > 1]
        if twice:
            raise ValueError(f"{self.card.name} has two records of {_some(twice)}; keep one of each video")
        good = [record for record in records if not record.error]
        return [self._summary(output, records, good) for output in self.outputs]

    def _summary(self, output: str, records: Sequence[Record], good: Sequence[Record]) -> Summary:
        used, left_out = self._chosen(good)
        value, others, notes = self._aggregate(output, used) if used else (None, {}, [])
        failed = {record.video: record.error for record in records if record.error}
        if failed:
            notes = [*notes, f"{len(failed)} of {len(records)} videos failed: {_some(list(failed))}"]
        if not good:
            notes = [*notes, "no video could be measured, so there is no number"]
        if self.card.missing:
            notes = [*notes, f"partial: {self.card.missing}"]
        notes = [*left_out, *_mixed(good), *notes]
        return Summary(
            name=output_name(self.card.name, output),
            value=value,
            provenance=self._provenance(output, records, good),
            failed=failed,
            notes=tuple(notes),
            partial=bool(failed) or bool(self.card.missing) or value is None,
            others=others,
        )

    def _chosen(self, good: Sequence[Record]) -> tuple[Sequence[Record], list[str]]:
        """Return the records that the number is made of, and a sentence about each rule that left some out."""
        return good, []

    def _aggregate(
        self, output: str, records: Sequence[Record]
    ) -> tuple[float | None, dict[str, float], list[str]]:
        """Make one number of at least one record; return it with further numbers and notes."""
        return mean([record.values[output] for record in records]), {}, []

    def _provenance(self, output: str, records: Sequence[Record], good: Sequence[Record]) -> Provenance:
        return Provenance(
            metric=output_name(self.card.name, output),
            version=self.card.version,
            backbone=self.backbone,
            weights=self.weights,
            frames=tuple(sorted({record.frames for record in good})),
            fps=tuple(sorted({record.fps for record in good})),
            resolution=tuple(sorted({f"{record.height}x{record.width}" for record in good})),
            prompts=hash_prompts(record.prompt for record in records),
            count=len(good),
            aggregation=self.aggregation,
            settings=self.settings,
        )


def measure_record(metric: VideoMetric, video: Tensor, *, name: str, prompt: str, fps: float) -> Record:
    """Measure a video that has a name; where the metric fails, the record says why, and nothing is raised."""
    frames, height, width = tuple(video.shape[:3])
    record = Record(video=name, prompt=prompt, frames=frames, height=height, width=width, fps=fps)
    try:
        found = metric.measure(video, prompt, fps)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return failed_record(record, error)
    return Record(**{**asdict(record), "values": dict(found.values), "details": dict(found.details)})


def failed_record(record: Record, error: Exception) -> Record:
    """Return the record of a video on which something failed; also of one that cannot be read."""
    reason = str(error) or type(error).__name__
    told = reason if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {reason}"
    return Record(**{**asdict(record), "values": {}, "details": {}, "error": told})


def unreadable_record(name: str, prompt: str, error: Exception) -> Record:
    """Return the record of a video file that cannot be read."""
    empty = Record(video=name, prompt=prompt, frames=0, height=0, width=0, fps=0.0)
    return failed_record(empty, error)


def check_video(video: Tensor, fps: float) -> None:
    """Raise ValueError unless ``video`` is uint8 [F, H, W, 3] and ``fps`` is a positive number."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != torch.uint8 or not video.numel():
        raise ValueError(f"a video must be uint8 [F, H, W, 3], got {video.dtype} {list(video.shape)}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}, expected the video's frames per second, a positive number")


def output_name(metric: str, output: str) -> str:
    """Return the name of a metric's output: the metric's own, with a slash where it has several."""
    return f"{metric}/{output}" if output else metric


def mean(values: Sequence[float]) -> float:
    """Return the mean, independent of the values' order up to the last digit."""
    return math.fsum(values) / len(values)


def _mixed(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each of size, frame count and rate in which the videos differ, naming the odd ones."""
    facts: dict[str, Callable[[Record], str]] = {
        "sizes": lambda record: f"{record.height} x {record.width}",
        "frame counts": lambda record: f"{record.frames} frames",
        "frame rates": lambda record: f"{record.fps:g} fps",
    }
    notes = []
    for fact, of in facts.items():
        usual = Counter(map(of, records)).most_common(1)[0][0] if records else ""
        odd = [f"{record.video} ({of(record)})" for record in records if of(record) != usual]
        if odd:
            notes.append(
                f"the videos have different {fact}, most {usual}, but {_some(odd)}: numbers of different {fact} are "
                "not comparable; write all videos in one way, or measure them apart"
            )
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
