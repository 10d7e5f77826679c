"""Plan methods that follow the reward's gradient: their own steps, on tensors without values.

What is planned is what runs, the method's ``learn_from``: predictions, decoder and reward model with a graph. Of
rewards that are not traced (see ``parts``) only the weights count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.data.prompts import PromptItem
from vpo_engine.distributed.processes import Processes
from vpo_engine.methods import method_class
from vpo_engine.model_values import SamplerState, TextEmbedding
from vpo_engine.protocols import ReferenceStore
from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rewards.registry import reward_card
from vpo_engine.values import Prompt
from vpo_engine.video_model import VideoModel

ScoreFrames = Callable[[Tensor], Tensor]
"""A function of float videos [B, F, 3, H, W] that returns one number for each, [B], with a graph."""


class PlannedReward:
    """A reward with the dimensions of the configured one, whose scores are what a function makes of the pixels."""

    def __init__(self, config: Config, score_frames: ScoreFrames | None) -> None:
        """``score_frames``: of the reward's network; None: the mean of the pixels, which keeps nothing."""
        self.dimensions = tuple(reward_card(config.reward.kind).dimensions)
        self._score = score_frames or (lambda videos: videos.mean(dim=(1, 2, 3, 4)))

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        raise AssertionError("a step that follows the gradient scores pixels")

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(self.dimensions, self._score(videos))


class PlannedVideos:
    """The given videos of a method that starts from some, without their values. Encoding them is not planned."""

    def __len__(self) -> int:
        raise AssertionError("a plan has its own prompts")

    def take(self, cursor: int, count: int) -> list[PromptItem]:
        raise AssertionError("a plan has its own prompts")

    def latents(self, model: VideoModel, prompt: Prompt) -> Tensor:
        return torch.zeros(model.latent_shape)


def planned_method(
    config: Config,
    model: VideoModel,
    score_frames: ScoreFrames | None,
    reference: ReferenceStore | None,
) -> RewardGradientMethod:
    """Return the configured method on a model without values; it has the optimizer, and no moving average.

    Raise ValueError for settings of the method that do not fit the model's videos.
    """
    alone = Processes(0, 1, torch.device("cpu"))
    found = method_class(config.method)
    assert issubclass(found, RewardGradientMethod)
    found.check(config, model)
    planned = found.costliest(config).model_copy(update={"ema": type(config.ema)()})
    return found(planned, model, PlannedReward(config, score_frames), reference, alone, None, PlannedVideos())


class LeftOutSampling:
    """Stands in for the sampling without gradients of a method, and keeps how far it goes."""

    def __init__(self) -> None:
        self.parts: list[tuple[SamplerState, TextEmbedding, int]] = []

    def __call__(self, state: SamplerState, text: TextEmbedding, stop: int) -> SamplerState:
        """Return ``state`` as if ``stop`` steps were done."""
        self.parts.append((state, text, stop))
        return SamplerState(state.latents, state.preview, stop, state.memory)
