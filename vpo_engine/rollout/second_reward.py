"""A second reward, whose gradient a method follows together with that of the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.config.methods import SecondRewardConfig
from vpo_engine.protocols import RewardWithGradients
from vpo_engine.rewards.combine import check_dimensions, combine
from vpo_engine.rewards.refusals import size_refusal
from vpo_engine.rewards.registry import build_reward, check_reward, reward_card
from vpo_engine.video_model import VideoModel


def check_second(setting: str, settings: SecondRewardConfig) -> None:
    """Raise ValueError for a second reward that is not there or passes no gradient, before a weight is read.

    setting: the name of its section, for errors.
    """
    try:
        check_reward(settings.kind, settings.path)
        check_dimensions(settings.dimensions, tuple(reward_card(settings.kind).dimensions))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    if not reward_card(settings.kind).differentiable:
        raise ValueError(
            f"{setting}.kind={settings.kind} passes no gradient; set another one, or {setting}=null"
        )


class SecondReward:
    """The reward model, on the model's device."""

    def __init__(self, setting: str, settings: SecondRewardConfig, model: VideoModel) -> None:
        """Read its weights. ValueError if it does not score videos of the model's size."""
        dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        reward = build_reward(settings.kind, settings.path, device=model.device, dtype=dtype, fps=model.fps)
        assert isinstance(reward, RewardWithGradients), "check_second refuses a reward without gradients"
        if model.video_size is not None and (reason := size_refusal(reward, *model.video_size)) is not None:
            raise ValueError(f"{setting}.kind={settings.kind} does not score the model's videos: {reason}")
        self._reward, self._dimensions = reward, settings.dimensions

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards [B] of pixels [B, F, 3, height, width] in 0..1 and B prompts, with gradients."""
        return combine(self._reward.score_pixels(pixels, prompts), self._dimensions)
