"""InstructVideo (arXiv 2312.12490): edits of given videos, whose last step follows the gradient of a reward.

for each step:
    take a video for each prompt, encode it, and add noise                rollout/given_videos.py
    sample from there (the last part of the steps), without gradient      reward_gradient_method.py
    make the last step with gradient                                      rollout/reward_gradient.py
    decode a random frame of each of S segments, and score it             rollout/scored_frames.py
    reward = mean over segments of exp(-lambda |frame - F // 2|) * score
    loss = mean(1 - reward)                                               objectives/reward_losses.py

The public code runs the last 12 of 20 DDIM steps, with guidance 3, on real videos; it has 4 segments and lambda 1. Its
noise is that of the published model, with an offset for each channel and frame, which the models here do not have. For
rewards that score whole videos the loss is 1 - reward of the whole video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import Prompts
from vpo_engine.method import Stream
from vpo_engine.models.registry import model_family
from vpo_engine.objectives.reward_losses import segmental_loss
from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rewards.frames import segment_weights
from vpo_engine.rollout.given_videos import GivenVideos, open_given_videos
from vpo_engine.rollout.reward_gradient import (
    denoise_with_gradients,
    first_below_noise,
    first_of_partial,
)
from vpo_engine.rollout.scored_frames import (
    check_enough,
    check_single_frames,
    frame_of_each_segment,
    frames_of_step,
)
from vpo_engine.values import Prompt, stacked_embeddings
from vpo_engine.video_model import VideoModel


class InstructVideo(RewardGradientMethod):
    """A partial chain of sampling steps on noised videos, and the gradient of the reward through its last step."""

    stream: GivenVideos

    def __init__(self, config: Config, *parts: Any) -> None:
        super().__init__(config, *parts)
        assert config.instructvideo is not None
        self.own, steps = config.instructvideo, self.sampling.steps
        if self.own.strength_of == "steps":
            self.first = first_of_partial(self.own.strength, steps)
        else:
            self.first = first_below_noise(self.model, self.own.strength, steps)
        self.segments = frames_of_step(config.reward.kind, self.own.segments, default=4)
        self._encode = self.timer.timed("encode", self._clean_latents)

    @classmethod
    def open_stream(cls, config: Config, prompts: Prompts) -> tuple[Stream, Texts]:
        own = config.instructvideo
        assert own is not None
        for name in ("segments", "attenuation"):
            check_single_frames(f"instructvideo.{name}", getattr(own, name), config.reward)
        family = model_family(config.model.kind)
        return open_given_videos("instructvideo.videos", own.videos, prompts, config.seed, family)

    def prepare(self, folder: Path, say: Callable[[str], None]) -> None:
        self.stream.prepare(self.model, folder.parent.parent / "encoded_videos", self.processes, say)

    @classmethod
    def check(cls, config: Config, model: VideoModel) -> None:
        assert config.instructvideo is not None
        count = frames_of_step(config.reward.kind, config.instructvideo.segments, default=4)
        check_enough("instructvideo.segments", count, model)

    def learn_from(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Mapping[str, Tensor]]:
        text, last = stacked_embeddings(prompts), self.sampling.steps - 1
        noise = self._noise(prompts, "edit")
        state = self.model.start_from(self._encode(prompts), noise, self.sampling.steps, self.first)
        state = self._sample(state, text, last)
        latents = denoise_with_gradients(self.model, self.model.network, state, text, self.sampling).latents
        self._count_trained(len(prompts), range(last, last + 1))
        if self.segments is None:
            rewards, scores = self._rewards(latents, prompts)
            return (1 - rewards).mean(), scores
        found = [self._segments(*each) for each in zip(latents.split(1), prompts, strict=True)]
        loss, rewards = segmental_loss(*(torch.stack(each) for each in zip(*found, strict=True)))
        return loss, dict.fromkeys(self.reward.dimensions, rewards)

    def _clean_latents(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the clean latents [B, C, T, H, W] of the videos of these prompts."""
        return torch.stack([self.stream.latents(self.model, prompt) for prompt in prompts])

    def _segments(self, latents: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Return the scores and the weights [S] of a random frame of each segment of a video [1, C, T, H, W]."""
        assert self.segments is not None
        assert self.model.video_size is not None
        frames = self.model.video_size[0]
        chosen = frame_of_each_segment(self.segments, frames, self.config.seed, "segments", prompt.position)
        images = self.model.decode_pixels(latents, chosen)[0]
        scores = self.reward.score_pixels(images.unsqueeze(1), [prompt.text] * self.segments)
        decay = 1.0 if self.own.attenuation is None else self.own.attenuation
        [values] = scores.values()
        return values, segment_weights(torch.tensor(chosen), frames, decay).to(values.device)
