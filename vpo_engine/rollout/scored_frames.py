"""The frames of its videos that a method decodes and scores, where the reward scores frames one by one."""

from __future__ import annotations

import random

from vpo_engine.config.reward import RewardConfig
from vpo_engine.rewards.frames import counted_frames
from vpo_engine.rewards.registry import scores_single_frames
from vpo_engine.seeding import integer
from vpo_engine.video_model import VideoModel


def frames_of_step(reward: str, wanted: int | None, default: int) -> int | None:
    """Return how many frames are scored, by the kind of reward; None: whole videos.

    wanted: the number in the settings; None: ``default`` for a reward of single frames.
    """
    return (wanted or default) if scores_single_frames(reward) else None


def check_single_frames(setting: str, value: object, reward: RewardConfig) -> None:
    """Raise ValueError for a setting of single frames with a reward that scores whole videos, and for a reward that
    would choose frames of its own among those that the method chooses."""
    if value is not None and not scores_single_frames(reward.kind):
        raise ValueError(
            f"{setting}={value} chooses frames, but reward.kind={reward.kind} scores whole videos; leave it out, or "
            "set a reward of single frames (its card says so: python -m vpo_engine.rank --list NAME)"
        )
    if reward.frame_reduce == "segments" and scores_single_frames(reward.kind):
        raise ValueError(
            f"reward.frame_reduce=segments chooses frames of whole videos, but {setting.partition('.')[0]} scores a "
            "few frames that it chooses itself; set reward.frame_reduce=mean or min"
        )


def check_same_sort(setting: str, second: str, first: str) -> None:
    """Raise ValueError if one of two rewards scores single frames, and the other one videos."""
    if scores_single_frames(second) != scores_single_frames(first):
        raise ValueError(
            f"{setting}.kind={second} and reward.kind={first} score single frames and whole videos, and cannot share "
            "what is decoded; give two of one sort"
        )


def check_enough(setting: str, count: int | None, model: VideoModel) -> None:
    """Raise ValueError for more frames than the model's videos have."""
    if count is not None and model.video_size is not None and count > model.video_size[0]:
        raise ValueError(
            f"{setting}={count} is more than the {counted_frames(model.video_size[0])} of the model's videos; lower it"
        )


def random_frames(count: int | None, model: VideoModel, seed: int, *key: str | int) -> list[int] | None:
    """Draw ``count`` different frames of the model's videos, in order; None: all."""
    if count is None or model.video_size is None:
        return None
    drawn = random.Random(integer(2**62, seed, *key, "frames"))
    return sorted(drawn.sample(range(model.video_size[0]), count))


def frame_of_each_segment(segments: int, num_frames: int, seed: int, *key: str | int) -> list[int]:
    """Draw one frame of each of ``segments`` runs of ``num_frames // segments`` frames; see ``segment_frames``."""
    span = num_frames // segments
    return [span * part + integer(span, seed, *key, part) for part in range(segments)]
