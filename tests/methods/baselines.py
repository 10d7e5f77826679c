"""The recorded numbers of public training code (``tests/data/methods``), and models that repeat its toy networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpo_engine.distributed.sequence import alone
from vpo_engine.models.opensora.model import Geometry, OpenSora
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.vae import OpenSoraVAE

DATA = Path(__file__).parent.parent / "data"
RECORDED: dict[str, Any] = json.loads((DATA / "methods" / "baselines.json").read_text())
ARRAYS = {
    name: torch.from_numpy(array) for name, array in np.load(DATA / "methods" / "baselines.npz").items()
}


def double(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class ChannelNetwork(nn.Module):
    """The network of ``vader_truncated_backprop_rflow``: a frozen base and an adapter, a number each per channel."""

    def __init__(self, base: Sequence[float], adapter: Sequence[float]) -> None:
        super().__init__()
        self.base = nn.Parameter(double(base), requires_grad=False)
        self.adapter = nn.Parameter(double(adapter))
        self.config = {"in_channels": len(base), "model_max_length": 1, "caption_channels": 1}
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.zeros(1, 1, dtype=torch.float64))
        self.dtype, self.sequence = torch.float32, alone()

    def forward(self, z: Tensor, t: Tensor, y: Tensor, mask: Tensor, **size: float) -> Tensor:
        wide = (1, -1, 1, 1, 1)
        time = 1 + t.double().view(-1, 1, 1, 1, 1) / 1000
        v = (
            self.base.view(wide) * z
            + self.adapter.view(wide) * z.tanh() * time
            + 0.1 * y.view(-1, 1, 1, 1, 1)
        )
        return torch.cat([v, 7 * v], dim=1)  # Open-Sora's further channels, which count for nothing


class NoText:
    def prepare(self, prompts: Sequence[str]) -> None:
        raise AssertionError

    def __call__(self, prompts: Sequence[str]) -> Any:
        raise AssertionError


def tiny_vae() -> OpenSoraVAE:
    tiny = json.loads((DATA / "opensora" / "vae_tiny.json").read_text())
    config = {"spatial_config": tiny["spatial_config"], "temporal_config": tiny["temporal_config"]}
    return OpenSoraVAE.from_config(
        {**config, **{name: tiny["constants"][name] for name in ("scale", "shift")}}
    )


def opensora_of(recorded: dict[str, Any]) -> OpenSora:
    """Return Open-Sora with the toy network in place of STDiT3, at the size of the recorded sampling."""
    return OpenSora(
        ChannelNetwork(recorded["base_w"], recorded["lora_a"]),  # type: ignore[arg-type]
        tiny_vae(),
        NoText(),
        Geometry(recorded["height"], recorded["width"], recorded["num_frames"], fps=24),
        RectifiedFlow(),
        device=torch.device("cpu"),
    )
