"""A differentiable reward for tiny models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Brightness:
    """Scores by the mean of all pixels, 0 to 1: ``reward.kind=bright_pixels:Brightness``."""

    dimensions = ("brightness",)

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1).requires_grad_(False)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"brightness": videos.double().mean(dim=(1, 2, 3, 4)).float() / 255}

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"brightness": videos.mean(dim=(1, 2, 3, 4))}
