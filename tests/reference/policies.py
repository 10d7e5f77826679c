"""Policies, inputs and a cheap loss for the tests of reference storage."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpo_engine.data.sprites.assets import load_policy
from vpo_engine.models.opensora.stdit3 import STDiT3

DATA = Path(__file__).parents[1] / "data" / "opensora"


def tiny_policy(dtype: torch.dtype = torch.float32) -> STDiT3:
    """The recorded STDiT3 of the public code at a tiny size."""
    network = STDiT3.from_config(json.loads((DATA / "stdit3_tiny.json").read_text())["config"])
    network.load_state_dict(load_file(DATA / "stdit3_tiny_weights.safetensors"))
    return network.to(dtype)


def sprites_policy(dtype: torch.dtype = torch.float32) -> STDiT3:
    return load_policy().to(dtype)


POLICIES = {"tiny": tiny_policy, "sprites": sprites_policy}


@torch.no_grad()
def on_grid(policy: nn.Module) -> nn.Module:
    """The policy with its trained weights rounded to values of bfloat16, in the dtype that holds them."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.bfloat16())
    return policy


def inputs(policy: STDiT3, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the network: ``rows`` small noisy latents with captions."""
    random = torch.Generator().manual_seed(seed)
    settings = policy.settings

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return {
        "x": normal(rows, settings.in_channels, 2, 6, 4),
        "timestep": torch.rand(rows, generator=random) * 1000,
        "y": normal(rows, 1, 5, settings.caption_channels),
        "fps": torch.full((rows,), 24.0),
        "height": torch.tensor([48.0]),
        "width": torch.tensor([32.0]),
    }
