"""The models and the rewards of ``soak.py``, which make a step of tens of milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from examples.own_model import CHANNELS, LetterEncoder, ToyModel, ToyNetwork
from vpo_engine.config import ModelConfig
from vpo_engine.data.sprites.assets import (
    GEOMETRY,
    WEIGHTS,
    Sprites,
    load_policy,
    load_text_encoder,
    load_vae,
)
from vpo_engine.data.sprites.world import all_captions
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.video_model import LoadContext

_FLOW = RectifiedFlow(use_timestep_transform=False)  # the transform counts chunks of 17 frames
_HELD_OUT = 2
_NARROW = {"hidden_size": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0}


class ShortSprites(Sprites):
    """The sprites world in clips of 5 frames of 16 x 16 pixels; text embeddings are kept on disk."""

    card = replace(Sprites.card, name="short sprites")

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        text = context.text_source(load_text_encoder, "short sprites")
        size = replace(GEOMETRY, height=16, width=16, num_frames=5)
        policy = load_policy(settings.policy)
        return cls(policy, load_vae(), text, size, _FLOW, device=context.device, dtype=context.dtype)


class Smallest(ToyModel):
    """The model of examples/own_model.py in videos of 3 frames of 16 x 16 pixels; text embeddings are kept on disk."""

    card = replace(ToyModel.card, name="smallest")

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        torch.manual_seed(0)
        found = cls(ToyNetwork(), context.text_source(LetterEncoder, "letters of the soak"), context)
        found.latent_shape = (CHANNELS, 3, 2, 2)
        return found


class Brightness:
    """Score a video by its mean brightness, and by that of its last frame."""

    dimensions = ("brightness", "last_frame")
    reads_prompt = False

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        levels = videos.float().flatten(2).mean(dim=2) / 255  # [B, F]
        return {"brightness": levels.mean(dim=1), "last_frame": levels[:, -1]}


class Contrast:
    """Score a video by the spread of its levels."""

    dimensions = ("contrast",)
    reads_prompt = False

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"contrast": videos.float().flatten(1).std(dim=1) / 255}


def write_inputs(folder: Path) -> None:
    """Write what a run reads: a narrow policy with random weights, training prompts and held-out prompts."""
    torch.manual_seed(0)
    config = json.loads((WEIGHTS / "policy" / "config.json").read_text()) | _NARROW
    network = STDiT3.from_config(config)
    for parameter in network.parameters():
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.02)
    (folder / "policy").mkdir(parents=True)
    save_pretrained_layout(network.state_dict(), network.config, folder / "policy")
    captions = all_captions()
    (folder / "held_out.txt").write_text("".join(f"{each}\n" for each in captions[:_HELD_OUT]))
    (folder / "train.txt").write_text("".join(f"{each}\n" for each in captions[_HELD_OUT:]))
