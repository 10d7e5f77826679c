"""Look at videos, and measure them with metrics, video by video; what is found out is written at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tqdm import tqdm

from vpo_engine.evaluation.arms import Arm
from vpo_engine.evaluation.chosen_metrics import Choice, metric_key
from vpo_engine.evaluation.folders import Video
from vpo_engine.evaluation.records import Facts, Records
from vpo_engine.metrics.provenance import hash_file
from vpo_engine.metrics.video_metric import Record, VideoMetric, failed_record, measure_record
from vpo_engine.runs.video_file import VideoFile

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int, float]
"""Frames, height, width and frames per second."""


@dataclass
class ArmVideos:
    """The videos of an arm, {(prompt, number): video}, and why some of them are not measured, {file: reason}."""

    arm: Arm
    videos: Mapping[tuple[str, int], Video]
    problems: dict[str, str] = field(default_factory=dict)
    hashes: dict[tuple[str, int], str] = field(default_factory=dict)
    shape: Shape | None = None


def scan(videos: Sequence[Video], records: Records, show: bool) -> None:
    """Find out size and rate of videos, and whether they can be read; known bytes are not decoded again."""
    for video in tqdm(videos, unit="file", desc="checking", disable=None if show else True):
        sha256 = hash_file(video.path)
        if records.facts(sha256) is not None:
            continue
        try:
            file = VideoFile.open(video.path)
        except (ValueError, OSError) as error:
            records.add_facts(Facts(sha256, error=str(error)))
        else:
            _, frames, height, width, _ = file.shape
            records.add_facts(Facts(sha256, frames, height, width, file.fps))


def settle(side: ArmVideos, records: Records) -> None:
    """Find the usual size of an arm's videos, and name the files that cannot be read or have another size.

    Raise ValueError if no video can be read, and if no size is the usual one.
    """
    shapes: dict[tuple[str, int], Facts] = {}
    for key, video in side.videos.items():
        side.hashes[key] = hash_file(video.path)
        facts = records.facts(side.hashes[key])
        assert facts is not None, video.path
        if facts.error:
            side.problems[video.name] = facts.error
        else:
            shapes[key] = facts
    if not shapes:
        first = next(iter(side.problems.values()))
        raise ValueError(f"none of the {len(side.videos)} videos of {side.arm.label} can be read: {first}")
    counted = Counter(facts.shape for facts in shapes.values()).most_common(2)
    if len(counted) == 2 and counted[0][1] == counted[1][1]:
        one, other = (next(f for f in shapes.values() if f.shape == shape) for shape, _ in counted)
        raise ValueError(
            f"half of the videos of {side.arm.label} have {one.describe()}, and as many {other.describe()}, whose "
            "numbers do not belong together; put them in folders of their own, and evaluate each"
        )
    side.shape = counted[0][0]
    usual = next(facts for facts in shapes.values() if facts.shape == side.shape)
    for key, facts in shapes.items():
        if facts.shape != side.shape:
            side.problems[side.videos[key].name] = (
                f"has {facts.describe()}, but most videos here have {usual.describe()}; write it anew like the "
                "others, or evaluate it in a folder of its own"
            )


def check_same_shape(policy: ArmVideos, baseline: ArmVideos) -> None:
    """Raise ValueError, naming what differs, if the videos of two arms differ in frames, size or rate."""
    assert policy.shape is not None
    assert baseline.shape is not None
    names = ("frames", "height", "width", "frames per second")
    different = [
        f"{name}: {one:g} and {other:g}"
        for name, one, other in zip(names, policy.shape, baseline.shape, strict=True)
        if one != other
    ]
    if different:
        raise ValueError(
            f"the videos of {policy.arm.label} and {baseline.arm.label} differ "
            f"({'; '.join(different)}), so their numbers cannot stand side by side; make both with the same settings, "
            "or evaluate each alone, without --baseline"
        )


def measure(
    share: Sequence[tuple[ArmVideos, Video]],
    covers: Callable[[str, Video], bool],
    choice: Choice,
    records: Records,
    device: torch.device,
    show: bool,
) -> dict[str, VideoMetric]:
    """Measure a process's share of the videos with every metric that looks at them; return the metrics.

    What is known already is not measured again. A metric that cannot be loaded is left out of the result, and
    ``records`` says why.
    """
    built: dict[str, VideoMetric] = {}
    for names in choice.passes():
        metrics = {name: metric for name in names if (metric := _load(choice, name, records, device))}
        built |= metrics
        with tqdm(total=len(share), unit="video", desc=_title(names), disable=None if show else True) as bar:
            for side, video in share:
                wanted = [metric for name, metric in metrics.items() if covers(name, video)]
                _measure_one(side, video, wanted, records)
                bar.update()
    return built


def _measure_one(side: ArmVideos, video: Video, metrics: Iterable[VideoMetric], records: Records) -> None:
    if video.name in side.problems:
        return
    sha256 = side.hashes[video.key]
    keys = {metric_key(metric): metric for metric in metrics}
    todo = {key: metric for key, metric in keys.items() if records.record(sha256, key, video.prompt) is None}
    if not todo:
        return
    facts = records.facts(sha256)
    assert facts is not None
    file = VideoFile(video.path, facts.frames, facts.height, facts.width, facts.fps)
    frames = file[:, :][0]
    file.close()
    for key, metric in todo.items():
        records.add_record(sha256, key, _record(metric, frames, video, facts))


def _record(metric: VideoMetric, frames: torch.Tensor, video: Video, facts: Facts) -> Record:
    """Measure one video. Whatever the metric raises is kept in the record, which names it."""
    name = video.name
    try:
        return measure_record(metric, frames, name=name, prompt=video.prompt, fps=facts.fps)
    except Exception as error:  # a metric of an installed package may raise anything
        size = {"frames": facts.frames, "height": facts.height, "width": facts.width, "fps": facts.fps}
        return failed_record(Record(video=name, prompt=video.prompt, **size), error)  # type: ignore[arg-type]


def _load(choice: Choice, name: str, records: Records, device: torch.device) -> VideoMetric | None:
    try:
        return choice.build(name, device)
    except (ValueError, OSError, ImportError) as error:
        records.unloaded[name] = str(error)
        return None


def _title(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} metrics"
