"""The losses of methods that follow the gradient of a reward. B videos have rewards [B]; higher is better.

Sources: ImageReward.py and refl.py of THUDM/ImageReward (ReFL); lora/rewards of VADER-Open-Sora in mihirp1998/VADER;
utils/reward of ali-vilab/VGen (InstructVideo).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def refl_loss(rewards: Tensor, margin: float | None = 2.0, scale: float = 1e-3) -> Tensor:
    """Return ReFL's scale * mean(relu(margin - reward)); -scale * mean(reward) if the margin is None.

    Rewards at or above the margin get no gradient. The published 2 belongs to ImageReward's standardised score.
    """
    if margin is None:
        return -scale * rewards.mean()
    return scale * F.relu(margin - rewards).mean()


@dataclass(frozen=True)
class Goal:
    """A reward that VADER's loss pulls towards: scale * mean|reward - value|.

    If value is None the loss is -scale * mean(reward).
    """

    value: float | None = None
    scale: float = 1.0

    def loss(self, rewards: Tensor) -> Tensor:
        if self.value is None:
            return -self.scale * rewards.mean()
        return self.scale * (rewards - self.value).abs().mean()


AESTHETIC, HPS, PICKSCORE = Goal(10.0, 0.1), Goal(1.0), Goal(100.0, 0.01)
"""VADER's goals for the LAION aesthetic predictor, HPSv2 and PickScore."""
_VADER_GOALS = {"laion_aesthetic": AESTHETIC, "hpsv2": HPS, "hpsv2_1": HPS, "pickscore": PICKSCORE}


def vader_goal(reward: str, value: float | Literal["auto"] | None, scale: float | None) -> Goal:
    """Return the goal of VADER's loss for a kind of reward; see ``VaderConfig``."""
    if value != "auto":
        return Goal(value, 1.0 if scale is None else scale)
    published = _VADER_GOALS.get(reward, Goal())
    return published if scale is None else replace(published, scale=scale)


def mixed(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weighted losses (or rewards) divided by their number, as VADER mixes two.

    Its loss is (1.5 aesthetic loss + 1 HPS loss) / 2, and the reward that it logs (1 aesthetic + 15 HPS) / 2.
    """
    parts = [weight * value for weight, value in zip(weights, values, strict=True)]
    return torch.stack(parts).sum(0) / len(parts)


def segmental_loss(scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return InstructVideo's loss, and the reward [B] of each video, from one scored frame of each of S segments.

    scores, weights: [B, S]. A video's reward is the mean of its weighted scores, not divided by the sum of weights, so
    far segments count for little; the loss is the mean of 1 - reward.
    """
    rewards = (scores * weights).mean(1)
    return (1 - rewards).mean(), rewards
