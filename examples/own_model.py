"""A model of your own: small enough to read at once, trained by the engine as any other.

    python -m vpo_engine.train examples/own_model.yaml

docs/models.md goes through it line by line. Videos are 8 frames of 96 x 192 pixels, and latents are the videos
themselves at an eighth of the size, so there is no VAE. Weights start at random: the model learns to please the reward,
not to make good videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpo_engine.config import ModelConfig
from vpo_engine.models.base import BaseModel
from vpo_engine.models.guidance import guided
from vpo_engine.models.solvers import EulerFlow
from vpo_engine.protocols import Network, TextEmbedding
from vpo_engine.video_model import LoadContext, ModelCard, SizeRule, TextRule, TextSource

CHANNELS, WIDTH, TOKENS = 3, 16, 32
LATENTS = (CHANNELS, 8, 12, 24)


class Block(nn.Module):
    """A convolution over space and time, shifted by the condition [B, WIDTH], beside the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Conv3d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.mix(torch.tanh(x + self.shift(condition)[:, :, None, None, None]))


class ToyNetwork(nn.Module):
    """Predicts the velocity of latents [B, C, T, H, W] at times t [B] from 0 to 1, with text [B, L, WIDTH]."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.enter = nn.Conv3d(CHANNELS, WIDTH, 1)
        self.time = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))  # the list of repeating blocks
        self.leave = nn.Conv3d(WIDTH, CHANNELS, 1)

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        counts = mask.to(text)[..., None]
        caption = (text * counts).sum(1) / counts.sum(1)
        condition = caption + self.time(torch.stack([t, 1 - t], dim=1).to(text))
        x = self.enter(latents)
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(x)


class LetterEncoder:
    """Gives every byte of a prompt a fixed random vector."""

    def __init__(self) -> None:
        self.table = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))

    def encode(self, prompts: list[str]) -> TextEmbedding:
        embeddings = torch.zeros(len(prompts), TOKENS, WIDTH)
        mask = torch.zeros(len(prompts), TOKENS, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            letters = list(prompt.encode())[:TOKENS]
            embeddings[row, : len(letters)] = self.table[letters]
            mask[row, : len(letters)] = True
        return TextEmbedding(embeddings, mask)


class ToyModel(BaseModel):
    """The network with text, schedule, sampler and decoder."""

    card = ModelCard(name="toy", lora_targets=("shift",), sizes=SizeRule(frame_step=8))

    def __init__(self, network: ToyNetwork, text: TextSource, context: LoadContext) -> None:
        super().__init__(network, None, text, device=context.device, dtype=context.dtype)
        self.latent_shape, self.fps = LATENTS, 8
        self.text_rule = TextRule(max_tokens=TOKENS, channels=WIDTH, padding="masked")

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        torch.manual_seed(0)
        network = ToyNetwork()
        if settings.policy is not None:  # where ``save_full_policy`` wrote it
            network.load_state_dict(load_file(settings.policy / "model.safetensors"))
        return cls(network, context.text_source(LetterEncoder, "letters", on_disk=False), context)

    def null_text(self, text: TextEmbedding) -> TextEmbedding:
        return TextEmbedding(torch.zeros_like(text.embeddings), text.mask)

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        def branch(latents: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
            return network(latents, t, text.embeddings, text.mask)

        return guided(branch, latents, t, text, self.null_text, guidance)

    def draw_timesteps(self, u: Tensor) -> Tensor:
        return u

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def target_scales(self, t: Tensor) -> tuple[float, float]:
        return 1.0, -1.0

    def solver(self, steps: int) -> EulerFlow:
        return EulerFlow([1 - step / steps for step in range(steps)], [1 / steps] * steps, num_timesteps=1)

    def to_video(self, latents: Tensor) -> Tensor:
        frames = latents.repeat_interleave(8, 3).repeat_interleave(8, 4)
        return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)

    def save_full_policy(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "model.safetensors")
