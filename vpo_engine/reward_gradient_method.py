"""The base of methods that follow the gradient of the reward: sampling, decoding, rewards and the update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.data.prompts import Stream
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.method import Method, Step
from vpo_engine.metrics.throughput import CountedRows, Work
from vpo_engine.protocols import (
    ReferenceStore,
    Reward,
    RewardWithGradients,
    SamplerSettings,
    SamplerState,
    TextEmbedding,
)
from vpo_engine.rewards.combine import combine
from vpo_engine.seeding import normal
from vpo_engine.values import Prompt, check_latents, stacked_embeddings
from vpo_engine.video_model import VideoModel


class RewardGradientMethod(Method):
    """A method whose policy follows the gradient of the reward of its own videos, through the decoder.

    A method defines ``learn_from``. All videos of a step have equal weights. Letters: B videos, one for each prompt.
    """

    def __init__(
        self,
        config: Config,
        model: VideoModel,
        reward: Reward,
        reference: ReferenceStore | None,
        processes: Processes,
        idle_offload: IdleOffload | None = None,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(config, model, reward, reference, processes, idle_offload, stream)
        assert isinstance(reward, RewardWithGradients), (
            "build.check_reward refuses a reward without gradients"
        )
        self.reward: RewardWithGradients = reward
        self.sampling = SamplerSettings(*config.trained_sampling)
        self._sampler = CountedRows(model.network, self.stopping.check)
        self._trained_rows = 0
        # The stage is timed, and idle parts are sent to the host, around the functions that do the work.
        self._update_policy = self.timer.timed("update", self._update)
        self._sample = self.timer.timed("rollout", self._denoise)
        self._backward = self.idle_offload.during("reward_gradient", self._add_gradients)

    @abstractmethod
    def learn_from(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Make a video for each of these prompts; return the mean of its losses, with the graph, and its scores.

        Scores: {dimension: [B]}, of the reward, for the log, and any others beside them.
        """

    @classmethod
    def costliest(cls, config: Config) -> Config:
        """Return the configuration with which every step takes as much memory as the largest one of ``config``, for the
        planner; by default, all steps are alike."""
        return config

    def step(self, prompts: Sequence[Prompt]) -> Step:
        metrics = self._update_policy(prompts)
        trained, self._trained_rows = self._trained_rows, 0
        work = Work(sampled=self._sampler.take(), trained=trained, videos=self.config.pairs_per_step)
        return self._step_made(metrics, work)

    def _update(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Make one optimizer step on the videos of all processes."""
        rate = self._begin_update()
        with self.stopping.stoppable():
            local = self._backward(prompts)
        sums = self.processes.sum(torch.stack([*local.values()]))
        means = dict(zip(local, (sums / self.processes.count).tolist(), strict=True))
        return means | {"lr": rate, "grad_norm": self._end_update(means["loss"])}

    def _add_gradients(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Add the gradient of the mean loss of the videos of these prompts; return the means for the log."""
        size = self.config.objective.micro_batch_size or len(prompts)
        means: dict[str, Tensor] = {}
        for start in range(0, len(prompts), size):
            self.stopping.check()
            chosen = prompts[start : start + size]
            share = len(chosen) / len(prompts)
            loss, scores = self.learn_from(chosen)
            # Processes that hold slices of a video have parts of its gradient, and the mean over all processes counts.
            self.optimizer.backward(loss * share * self.processes.sequence.count)
            found = {"loss": loss, **{f"reward/{name}": value.mean() for name, value in scores.items()}}
            own = {name: scores[name] for name in self.reward.dimensions}
            found["reward/selected"] = combine(own, self.config.reward.dimensions).mean()
            for name, value in found.items():
                here = value.detach().to(self.processes.device, torch.float64)
                means[name] = means.get(name, 0.0) + share * here
        return means

    # --- for ``learn_from`` ------------------------------------------------------------------------------------

    def _step_number(self, prompts: Sequence[Prompt]) -> int:
        """Return the number of the step that these prompts belong to, which keys what all of its videos share."""
        return prompts[0].position // self.config.pairs_per_step

    def _noise(self, prompts: Sequence[Prompt], purpose: str = "rollout") -> Tensor:
        """Return noise [B, C, T, H, W], a function of the seed, the purpose and each prompt's position."""
        shape = (1, *self.model.latent_shape)
        noise = [normal(shape, self.config.seed, purpose, prompt.position) for prompt in prompts]
        return torch.cat(noise).to(self.processes.device)

    def _denoise(self, state: SamplerState, text: TextEmbedding, stop: int) -> SamplerState:
        """Go on from ``state`` until ``stop`` of the steps of ``sampling`` are done, without gradients."""
        return self.model.denoise(self._sampler, state, text, self.sampling, stop)

    def _sampled(self, prompts: Sequence[Prompt], stop: int) -> tuple[SamplerState, TextEmbedding]:
        """Return a video of each prompt after ``stop`` steps from noise, made without gradients, and their text."""
        text = stacked_embeddings(prompts)
        return self._sample(self.model.start(self._noise(prompts)), text, stop), text

    def _rewards(
        self, latents: Tensor, prompts: Sequence[Prompt], frames: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rewards [B] of clean latents, and their scores, with gradients; ``frames``: of those frames."""
        return self._scored(self.model.decode_pixels(check_latents(latents), frames), prompts)

    def _scored(self, pixels: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rewards [B] of pixels [B, F, 3, height, width] in 0..1, and their scores, with gradients."""
        scores = self.reward.score_pixels(pixels, [prompt.text for prompt in prompts])
        return combine(scores, self.config.reward.dimensions), scores

    def _count_trained(self, videos: int, steps: range) -> None:
        """Count the inputs that these steps of the sampling send through the network with gradients."""
        self._trained_rows += videos * len(steps) * (1 if self.sampling.guidance == 1.0 else 2)
