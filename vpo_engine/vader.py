"""VADER (arXiv 2407.08737): reward gradients through the last sampling steps, for any sampler of the engine.

for each step:
    sample a video per prompt up to the last K steps, without gradient      reward_gradient_method.py
    make the last K steps with gradient, from one to the next               rollout/reward_gradient.py
    decode a random frame, or all for a reward of motion, and score it      reward_gradient_method.py
    loss = scale * mean|goal - reward|, or a mix of two such losses         objectives/reward_losses.py

The latents are not detached between the K steps: this is truncated backpropagation through time, with guidance, and
each step is checkpointed. The public code has K = 1, and for some experiments K = 15 of 30, or random. Its goals are 10
for the LAION aesthetic predictor, 1 for HPSv2 and 100 for PickScore; its mix is (1.5 aesthetic loss + HPS loss) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rollout.reward_gradient import denoise_with_gradients
from vpo_engine.seeding import generator
from vpo_engine.values import Prompt


class VADER(RewardGradientMethod):
    """The last K steps of sampling, and the gradient of the reward of the video that they end in."""

    def learn_from(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Mapping[str, Tensor]]:
        first = self.sampling.steps - self._last_steps(prompts)
        state, text = self._sampled(prompts, first)
        latents = denoise_with_gradients(self.model, self.model.network, state, text, self.sampling).latents
        self._count_trained(len(prompts), range(first, self.sampling.steps))
        rewards, scores = self._rewards(latents, prompts, self._random_frames(prompts))
        return self.goal.loss(rewards), scores

    def _last_steps(self, prompts: Sequence[Prompt]) -> int:
        """Return K, which is the same for all videos of a step."""
        own = self.config.vader
        assert own is not None
        if not own.random_steps:
            return own.last_steps
        random = generator(self.config.seed, "vader", self._step_number(prompts))
        return int(torch.randint(1, self.sampling.steps + 1, (), generator=random))
