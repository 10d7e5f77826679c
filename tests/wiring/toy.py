"""A video model and a reward of a few hundred numbers, with every part that the algorithm asks for.

The toy follows the documented rules of rectified flow: x_t = (1 - t / 1000) * latents + (t / 1000) * noise, and the
network predicts latents - noise. Everything is a plain formula, so that a test can compute it again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vpo_engine.config import ModelConfig
from vpo_engine.model_values import RowFlops
from vpo_engine.models.base import BaseModel
from vpo_engine.models.guidance import guided
from vpo_engine.models.solvers import EulerFlow
from vpo_engine.protocols import Network, SamplerSettings, TextEmbedding
from vpo_engine.video_model import LoadContext, ModelCard, TextRule

SHAPE = (2, 3, 2, 2)
"""(C, T, H, W) of the latents."""
WIDTH = 4
PADDING = 9.0
PIXELS = 4
"""Rows and columns of the video: each latent cell is a square of 2 x 2 pixels."""
DIMENSIONS = ("visual_quality", "temporal_consistency", "text_alignment")


def numbers_of(text: str, count: int) -> Tensor:
    """Standard normal numbers [count] that depend on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


class ToyNetwork(nn.Module):
    """Predicts the velocity of x [B, C, T, H, W] at t [B] for the mean word of a caption, [B, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        size = math.prod(SHAPE)
        self.blocks = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
        self.text = nn.Linear(WIDTH, size)
        self.time = nn.Linear(1, size)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        flat = x.flatten(1)
        hidden = torch.tanh(self.blocks[0](flat) + self.text(caption) + self.time((t / 1000)[:, None]))
        return (self.blocks[1](hidden) - 0.5 * flat).view_as(x)


NULL = torch.tensor([0.3, -0.2, 0.1, 0.4])
"""The caption of the unguided branch."""


def caption_of(text: TextEmbedding) -> Tensor:
    """The mean of the words that count, [B, WIDTH]."""
    mask = text.mask[..., None].to(text.embeddings)
    return (text.embeddings * mask).sum(1) / mask.sum(1)


class WordEncoder:
    """Gives every word of a prompt numbers of its own; padding is large, since it must never count."""

    def encode(self, prompts: list[str]) -> TextEmbedding:
        lengths = [len(prompt.split()) for prompt in prompts]
        embeddings = torch.full((len(prompts), max(lengths), WIDTH), PADDING)
        mask = torch.zeros(len(prompts), max(lengths), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(prompt.split()):
                embeddings[row, place] = numbers_of(f"{prompt} {word}", WIDTH)
            mask[row, : lengths[row]] = True
        return TextEmbedding(embeddings, mask)


class ToyModel(BaseModel):
    """The toy as a family of models: model.kind=toy:ToyModel."""

    card = ModelCard(
        name="toy",
        supports=frozenset(
            {
                "rollout.guidance",
                "rollout.guidance_interval",
                "rollout.cache",
                "rollout.compile=blocks",  # changes nothing: the toy has nothing to compile
                "rollout.prune.frames",
            }
        ),
    )

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        text = context.text_source(WordEncoder, "words", on_disk=False)
        model = cls(ToyNetwork(), None, text, device=context.device, dtype=context.dtype)
        model.latent_shape, model.fps = SHAPE, 8
        model.text_rule = TextRule(max_tokens=16, channels=WIDTH)
        return model

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        text = super().embed(prompts)
        return TextEmbedding(text.embeddings.masked_fill(~text.mask[..., None], PADDING), text.mask)

    def null_text(self, text: TextEmbedding) -> TextEmbedding:
        return TextEmbedding(NULL.to(text.embeddings).expand_as(text.embeddings), text.mask)

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        def branch(latents: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
            return network(latents, t, caption_of(text))

        return guided(branch, latents, t, text, self.null_text, guidance)

    def predictor(
        self, network: Network, text: TextEmbedding, settings: SamplerSettings, guidance: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return predictions that a cache makes smaller, so that it can be told whether and where there was one."""
        share = 1 - (settings.cache or 0.0)
        return lambda latents, t: share * ToyModel.predict(self, network, latents, t, text, guidance)

    def draw_timesteps(self, u: Tensor) -> Tensor:
        return 1000 * u.sqrt()

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t / 1000, t / 1000

    def target_scales(self, t: Tensor) -> tuple[float, float]:
        return 1.0, -1.0

    def solver(self, steps: int) -> EulerFlow:
        return EulerFlow(sampling_times(steps), [1 / steps] * steps)

    def to_video(self, latents: Tensor) -> Tensor:
        return video_of(latents)

    def row_flops(self, text: TextEmbedding) -> RowFlops:
        return RowFlops(1.0, 1.0)

    def save_full_policy(self, folder: Path) -> None:
        weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        save_file(weights, folder / "model.safetensors")


def video_of(latents: Tensor) -> Tensor:
    """uint8 [B, T, PIXELS, PIXELS, 3]; the third colour is the mean of the two latent channels."""
    colours = torch.cat([latents, latents.mean(1, keepdim=True)], dim=1).sigmoid() * 255
    wide = colours.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    return wide.permute(0, 2, 3, 4, 1).round().to(torch.uint8)


def velocity(network: Network, z: Tensor, t: Tensor, captions: Tensor, guidance: float) -> Tensor:
    """Return the guided velocity, for the oracle; both branches go through the network in one batch."""
    if guidance == 1.0:
        return network(z, t, captions)
    nulls = NULL.to(captions).expand_as(captions)
    both = network(torch.cat([z, z]), torch.cat([t, t]), torch.cat([captions, nulls]))
    prompted, unprompted = both.chunk(2)
    return unprompted + guidance * (prompted - unprompted)


def sampling_times(steps: int) -> list[float]:
    return [1000 * (1 - number / steps) for number in range(steps)]


class ToyReward:
    """Scores by formulas of the pixels and the prompt, of very different sizes.

    Prompts with the word "tie" have equal candidates; with the word "coarse" scores are rounded so much that some
    candidates are equal. ``power`` multiplies all scores: -1 turns the preference around.
    """

    dimensions = DIMENSIONS

    def __init__(self, power: float = 1.0) -> None:
        self.power = power
        self.seen: list[tuple[Tensor, str]] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        assert videos.dtype == torch.uint8
        assert not torch.is_grad_enabled() or not videos.requires_grad
        assert len(videos) == len(prompts)
        self.seen += [(video.clone(), prompt) for video, prompt in zip(videos, prompts, strict=True)]
        rows = [scores_of(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
        return {
            name: torch.tensor([self.power * row[number] for row in rows])
            for number, name in enumerate(DIMENSIONS)
        }


def scores_of(video: Tensor, prompt: str) -> tuple[float, float, float]:
    """Of uint8 [F, H, W, 3]: brightness of the first colour, steadiness, and what the prompt likes."""
    pixels = video.double() / 255
    words = prompt.split()
    if "tie" in words:
        return 0.5, 2.0, 1.0
    brightness = float(pixels[..., 0].mean())
    steadiness = 30.0 * (1 - float((pixels[1:] - pixels[:-1]).abs().mean()))
    liked = 4.0 * float((pixels.mean(dim=(0, 1, 2)) * numbers_of(prompt, 3).double()).sum())
    if "coarse" in words:
        return round(brightness * 8) / 8, round(steadiness / 4) * 4.0, round(liked)
    return brightness, steadiness, liked


def toy_motion(videos: Tensor) -> Tensor:
    """Stands for the measure of motion: the mean change between frames, in levels; float32 [B]."""
    return (videos[:, 1:].double() - videos[:, :-1].double()).abs().mean(dim=(1, 2, 3, 4)).float()


def toy_change(luma: Tensor) -> Tensor:
    """The same of luminance [B, F, 1, h, w]."""
    return (luma[:, 1:] - luma[:, :-1]).abs().flatten(1).mean(1)
