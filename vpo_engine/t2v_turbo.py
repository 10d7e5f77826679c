"""T2V-Turbo (arXiv 2405.18750): consistency distillation with rewards, for rectified flow and for v-prediction.

for each step:
    take a video for each prompt, encode it, and add noise at time t      rollout/given_videos.py
    f = the student's clean latents at t, in one prediction               objectives/consistency.py
    the teacher's guided step from t to the time t' before it             objectives/consistency.py
    target = the student's clean latents there, without gradient
    loss = pseudo-Huber(f, target) - weight * reward of decoded frames of f, or of two rewards

The student is the policy. The teacher is the policy that the run starts from: the frozen reference. t is one of the
times of the teacher's 50 steps. For rectified flow f = x_t + t v, which is x_0 at t = 0; schedules with noise at t = 0
get the published boundary scalings.

The policy becomes another kind of sampler, for 4 to 8 steps without guidance: evaluate it so (evaluation.steps=8
rollout.guidance=1), and compare it at the same few steps.
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
from vpo_engine.memory.checkpointing import recomputed
from vpo_engine.method import Stream
from vpo_engine.models.registry import model_family
from vpo_engine.objectives.consistency import consistency_output, pseudo_huber, split
from vpo_engine.protocols import TextEmbedding
from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rollout.given_videos import GivenVideos, open_given_videos
from vpo_engine.rollout.scored_frames import (
    check_enough,
    check_single_frames,
    frames_of_step,
    random_frames,
)
from vpo_engine.rollout.second_reward import SecondReward, check_second
from vpo_engine.seeding import integer
from vpo_engine.values import Prompt, stacked_embeddings
from vpo_engine.video_model import VideoModel


class T2VTurbo(RewardGradientMethod):
    """A student that skips to the end of the teacher's way, and the gradient of the reward of where it arrives."""

    stream: GivenVideos

    def __init__(self, config: Config, *parts: Any) -> None:
        super().__init__(config, *parts)
        assert config.t2v_turbo is not None
        self.own = config.t2v_turbo
        self.frames = frames_of_step(config.reward.kind, self.own.frames, default=5)
        self.second: SecondReward | None = None
        if self.own.second is not None:
            self.second_frames = frames_of_step(self.own.second.kind, None, default=5)
        solver = self.model.solver(self.own.steps)
        self.times = torch.tensor([*solver.times, 0.0])
        self._encode = self.timer.timed("encode", self._clean_latents)

    @classmethod
    def open_stream(cls, config: Config, prompts: Prompts) -> tuple[Stream, Texts]:
        own = config.t2v_turbo
        assert own is not None
        check_single_frames("t2v_turbo.frames", own.frames, config.reward)
        if own.second is not None:
            check_second("t2v_turbo.second", own.second)
        family = model_family(config.model.kind)
        return open_given_videos("t2v_turbo.videos", own.videos, prompts, config.seed, family)

    def prepare(self, folder: Path, say: Callable[[str], None]) -> None:
        self.stream.prepare(self.model, folder.parent.parent / "encoded_videos", self.processes, say)
        if self.own.second is not None:
            self.second = SecondReward("t2v_turbo.second", self.own.second, self.model)

    @classmethod
    def check(cls, config: Config, model: VideoModel) -> None:
        assert config.t2v_turbo is not None
        count = frames_of_step(config.reward.kind, config.t2v_turbo.frames, default=5)
        check_enough("t2v_turbo.frames", count, model)
        second = config.t2v_turbo.second
        if second is None or model.video_size is None:
            return
        count, frames = frames_of_step(second.kind, None, default=5), model.video_size[0]
        if count is not None and count > frames:
            raise ValueError(
                f"t2v_turbo.second.kind={second.kind} scores {count} frames of every video, but the model's have "
                f"{frames}; raise model.num_frames, or set t2v_turbo.second=null"
            )

    def learn_from(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Mapping[str, Tensor]]:
        text, (t, before) = stacked_embeddings(prompts), self._times(prompts)
        noised = self.model.add_noise(self._encode(prompts), self._noise(prompts, "distil"), t)
        answer = recomputed(self._answer, noised, t, text)
        with torch.no_grad():
            target = self._answer(self._teacher_step(noised, t, before, text), before, text)
        self._trained_rows += len(prompts)
        rewards, scores = self._rewards(answer, prompts, self._frames(self.frames, prompts))
        loss = pseudo_huber(answer, target, self.own.huber) - self.own.reward_weight * rewards.mean()
        if self.second is None or self.own.second is None:
            return loss, scores
        pixels = self.model.decode_pixels(answer, self._frames(self.second_frames, prompts))
        others = self.second(pixels, [prompt.text for prompt in prompts])
        return loss - self.own.second.weight * others.mean(), {**scores, "second": others}

    def _frames(self, count: int | None, prompts: Sequence[Prompt]) -> list[int] | None:
        number = self._step_number(prompts)
        return random_frames(count, self.model, self.config.seed, "t2v_turbo", number)

    def _times(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Return a random time t of the teacher's steps for each prompt, and the time after its step, each [B]."""
        drawn = [integer(self.own.steps, self.config.seed, "time", each.position) for each in prompts]
        times, places = self.times.to(self.processes.device), torch.tensor(drawn)
        return times[places], times[places + 1]

    def _answer(self, latents: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Return f(x_t, t), the clean latents [B, C, T, H, W] that the policy reaches in one step."""
        model = self.model
        prediction = model.predict(model.network, latents, t, text)
        clean = split(latents, prediction, model.noising_scales(t), model.target_scales(t)).clean
        _, added = model.noising_scales(torch.zeros_like(t))
        return consistency_output(latents, t, clean, noise_at_zero=bool((added > 0).any()))

    def _teacher_step(self, latents: Tensor, t: Tensor, before: Tensor, text: TextEmbedding) -> Tensor:
        """Return the latents at the times ``before`` that the teacher's guided step leads to."""
        model = self.model
        assert self.reference is not None
        prediction = model.predict(self.reference, latents, t, text, self.own.guidance + 1)
        found = split(latents, prediction, model.noising_scales(t), model.target_scales(t))
        return found.at(*model.noising_scales(before))

    def _clean_latents(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the clean latents [B, C, T, H, W] of the videos of these prompts."""
        return torch.stack([self.stream.latents(self.model, prompt) for prompt in prompts])
