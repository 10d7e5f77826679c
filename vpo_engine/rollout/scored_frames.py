"""The frames of its videos that a method decodes and scores, where the reward scores frames one by one."""

from __future__ import annotations

import torch

from vpo_engine.rewards.frames import counted_frames
from vpo_engine.rewards.registry import scores_single_frames
from vpo_engine.seeding import generator
from vpo_engine.video_model import VideoModel


def frames_of_step(reward: str, wanted: int | None, default: int) -> int | None:
    """Return how many frames are scored, by the kind of reward; None: whole videos.

    wanted: the number in the settings; None: ``default`` for a reward of single frames.
    """
    return (wanted or default) if scores_single_frames(reward) else None


def check_single_frames(setting: str, value: object, reward: str) -> None:
    """Raise ValueError for a setting of single frames with a reward that scores whole videos."""
    if value is not None and not scores_single_frames(reward):
        raise ValueError(
            f"{setting}={value} chooses frames, but reward.kind={reward} scores whole videos; leave it out, or set a "
            "reward of single frames (its card says so: python -m vpo_engine.rank --list NAME)"
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
    drawn = torch.randperm(model.video_size[0], generator=generator(seed, *key, "frames"))
    return sorted(drawn[:count].tolist())
