"""VADER (arXiv 2407.08737): reward gradients through the last sampling steps, for any sampler of the engine.

for each step:
    sample a video per prompt up to the last K steps, without gradient    reward_gradient_method.py
    make the last K steps with gradient, one after the other              rollout/reward_gradient.py
    decode a random frame (all for a reward of videos), and score it      reward_gradient_method.py
    loss = scale * mean|reward - goal|, or a mix of two                   objectives/reward_losses.py

Latents are not detached between the K steps: this is truncated backpropagation through time, with guidance, and every
step is checkpointed. The public code has K = 1, or 15 of 30, or a random K. Its goals are 10 for the LAION aesthetic
predictor, 1 for HPSv2 and 100 for PickScore; its mix is (1.5 * aesthetic loss + HPS loss) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import Prompts
from vpo_engine.method import Stream
from vpo_engine.objectives.reward_losses import mixed, vader_goal
from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rollout.reward_gradient import denoise_with_gradients
from vpo_engine.rollout.scored_frames import (
    check_enough,
    check_same_sort,
    check_single_frames,
    frames_of_step,
    random_frames,
)
from vpo_engine.rollout.second_reward import SecondReward, check_second
from vpo_engine.seeding import integer
from vpo_engine.values import Prompt, check_latents
from vpo_engine.video_model import VideoModel


class VADER(RewardGradientMethod):
    """The last K steps of sampling, and the gradient of the reward of the video that they end in."""

    def __init__(self, config: Config, *parts: Any) -> None:
        super().__init__(config, *parts)
        assert config.vader is not None
        self.own, kind = config.vader, config.reward.kind
        self.goal = vader_goal(kind, self.own.goal, self.own.scale)
        self.frames = frames_of_step(kind, self.own.frames, default=1)
        self.second: SecondReward | None = None

    @classmethod
    def open_stream(cls, config: Config, prompts: Prompts) -> tuple[Stream, Texts]:
        assert config.vader is not None
        check_single_frames("vader.frames", config.vader.frames, config.reward)
        if (second := config.vader.second) is not None:
            check_second("vader.second", second)
            check_same_sort("vader.second", second.kind, config.reward.kind)
        return super().open_stream(config, prompts)

    def prepare(self, folder: Path, say: Callable[[str], None]) -> None:
        if self.own.second is not None:
            self.second = SecondReward("vader.second", self.own.second, self.model)

    @classmethod
    def check(cls, config: Config, model: VideoModel) -> None:
        assert config.vader is not None
        count = frames_of_step(config.reward.kind, config.vader.frames, default=1)
        check_enough("vader.frames", count, model)

    @classmethod
    def costliest(cls, config: Config) -> Config:
        """See ``RewardGradientMethod``. K may be drawn as large as all steps."""
        assert config.vader is not None
        most = {"random_steps": False, "last_steps": config.trained_sampling[0]}
        return config.model_copy(
            update={"vader": config.vader.model_copy(update=most if config.vader.random_steps else {})}
        )

    def learn_from(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Mapping[str, Tensor]]:
        number = self._step_number(prompts)
        first = self.sampling.steps - self._last_steps(number)
        state, text = self._sampled(prompts, first)
        latents = denoise_with_gradients(self.model, self.model.network, state, text, self.sampling).latents
        self._count_trained(len(prompts), range(first, self.sampling.steps))
        frames = random_frames(self.frames, self.model, self.config.seed, "vader", number)
        pixels = self.model.decode_pixels(check_latents(latents), frames)
        rewards, scores = self._scored(pixels, prompts)
        if self.second is None or self.own.second is None:
            return self.goal.loss(rewards), scores
        others = self.second(pixels, [prompt.text for prompt in prompts])
        losses = self.goal.loss(rewards), vader_goal(self.own.second.kind, "auto", None).loss(others)
        return mixed(losses, (self.own.weight, self.own.second.weight)), {**scores, "second": others}

    def _last_steps(self, number: int) -> int:
        """Return K of a step, which is the same for all of its videos."""
        if not self.own.random_steps:
            return self.own.last_steps
        return 1 + integer(self.sampling.steps, self.config.seed, "vader", number)
