"""ReFL (ImageReward, arXiv 2304.05977, algorithm 1), for any sampler of the engine.

for each step:
    m = a random one of the last steps
    sample a video per prompt up to step m, without gradient    reward_gradient_method.py
    predict the clean latents x0 from step m, with gradient     rollout/reward_gradient.py
    decode them, and score the pixels                           reward_gradient_method.py
    loss = scale * mean(relu(margin - reward))                  objectives/reward_losses.py

The graph has one prediction, the decoder and the reward model. The public code gives scale 1e-3, 40 steps of which m is
one of the last ten, and no guidance. Its margin of 2 belongs to the normalised score of ImageReward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vpo_engine.objectives.reward_losses import refl_loss
from vpo_engine.reward_gradient_method import RewardGradientMethod
from vpo_engine.rollout.reward_gradient import clean_prediction
from vpo_engine.seeding import integer
from vpo_engine.values import Prompt


class ReFL(RewardGradientMethod):
    """One late prediction of the clean video, and the gradient of its reward."""

    def learn_from(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Mapping[str, Tensor]]:
        own = self.config.refl
        assert own is not None
        late = self._late_step(prompts, own.last_steps)
        state, text = self._sampled(prompts, late)
        latents = clean_prediction(self.model, self.model.network, state, text, self.sampling)
        self._count_trained(len(prompts), range(late, late + 1))
        rewards, scores = self._rewards(latents, prompts)
        return refl_loss(rewards, own.margin, own.scale), scores

    def _late_step(self, prompts: Sequence[Prompt], last_steps: int) -> int:
        """Return m, which is the same for all videos of a step, counted from noise and from 0."""
        drawn = integer(last_steps, self.config.seed, "refl", self._step_number(prompts))
        return self.sampling.steps - last_steps + drawn
