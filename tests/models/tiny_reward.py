"""A reward for whole runs on tiny folders: it takes videos of any size, and costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Brightness:
    """Scores by the mean of all pixels: ``reward.kind=tiny_reward:Brightness``."""

    dimensions = ("brightness",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"brightness": videos.double().mean(dim=(1, 2, 3, 4)).float()}
