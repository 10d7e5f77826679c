"""The toy of these tests with gradients: a decoder and a reward through which a method's gradient can flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from engine import RecordingModel
from torch import Tensor
from toy import SHAPE, ToyReward, numbers_of, scores_of

UNUSED = (
    "rollout.candidates=4",
    "reference.refresh_every=200",
    "objective.beta=500",
    "pairs.dataset=none",
)
"""The defaults of what engine.SETTINGS gives and methods without pairs do not use."""
SETTINGS = (
    "model.kind=gradient_toy:GradientModel",
    "reward.kind=gradient_toy:GradientReward",
    "reward.dimensions={visual_quality: 1.0, text_alignment: 3.0}",
    *UNUSED,
)


class GradientModel(RecordingModel):
    """The toy model, which also decodes with gradients."""

    card = replace(RecordingModel.card, supports=RecordingModel.card.supports | {"method=reward_gradient"})

    def to_pixels(self, latents: Tensor, frames: Sequence[int] | None) -> Tensor:
        return 2 * pixels_of(latents if frames is None else latents[:, :, list(frames)]) - 1

    @classmethod
    def real_video(cls, prompt: str, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 256, (SHAPE[1], 4, 4, 3), generator=generator, dtype=torch.uint8)

    def to_latents(self, pixels: Tensor) -> Tensor:
        return latents_of(pixels)


def latents_of(pixels: Tensor) -> Tensor:
    """Latents [B, 2, T, 2, 2] of pixels [B, 3, T, 4, 4]: means of squares of the first two colours."""
    return 2 * pixels[:, :2].unflatten(4, (2, 2)).unflatten(3, (2, 2)).mean((4, 6))


def pixels_of(latents: Tensor) -> Tensor:
    """The video of latents [B, 2, T, 2, 2] before it is rounded: [B, T, 3, 4, 4] in 0..1."""
    colours = torch.cat([latents, latents.mean(1, keepdim=True)], dim=1).sigmoid()
    return colours.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4).movedim(1, 2)


class GradientReward(ToyReward):
    """The toy reward without its ties, which also scores pixels with gradients."""

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        assert videos.min() >= 0
        assert videos.max() <= 1
        assert len(videos) == len(prompts)
        rows = torch.stack(
            [pixel_scores(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
        )
        return dict(zip(self.dimensions, rows.unbind(1), strict=True))


def pixel_scores(video: Tensor, prompt: str) -> Tensor:
    """The scores [3] of a video [F, 3, H, W], by the formulas of ``toy.scores_of``."""
    brightness = video[:, 0].mean()
    steadiness = 30.0 * (1 - (video[1:] - video[:-1]).abs().mean())
    liked = 4.0 * (video.mean(dim=(0, 2, 3)) * numbers_of(prompt, 3)).sum()
    return torch.stack([brightness, steadiness, liked]).float()


def check_formulas() -> None:
    """Both kinds of scores are the same where nothing is rounded."""
    video = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8)
    ours = pixel_scores(video.movedim(3, 1) / 255, "a cat")
    torch.testing.assert_close(ours, torch.tensor(scores_of(video, "a cat")), rtol=1e-5, atol=1e-5)
