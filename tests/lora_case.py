"""Adapters on a policy of the sprites world, with inputs and settings, for tests of LoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_policy import small_network
from torch import Tensor

from vpo_engine.config import Config, LoraConfig
from vpo_engine.models.lora import adapter_parameters
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.seeding import normal

Make = Callable[..., Config]

TARGETS = OpenSora.card.lora_targets
SETTINGS = LoraConfig(rank=3, alpha=5.0, targets=TARGETS)
LORA = ("model.lora.rank=4", "model.lora.alpha=8", "reference.storage=adapter", "optimizer.lr=1e-3")
LAYERS_PER_BLOCK = 5
PROMPT = "a red circle moving left"


def inputs(rows: int = 2) -> dict[str, Tensor | float]:
    """A batch for the sprites policy: uneven captions, an odd latent grid."""
    settings = small_network().settings
    lengths = torch.arange(rows)[:, None] + 3
    return {
        "x": normal((rows, settings.in_channels, 3, 5, 6), 0, "x"),
        "timestep": torch.linspace(50.0, 900.0, rows),
        "y": normal((rows, 1, 7, settings.caption_channels), 0, "y"),
        "mask": torch.arange(7)[None] < lengths,
        "fps": 8.0,
        "height": 40.0,
        "width": 48.0,
    }


def disturb(network: STDiT3) -> None:
    """Give every weight of the adapter a value, as training does."""
    with torch.no_grad():
        for name, weight in adapter_parameters(network).items():
            weight.copy_(0.05 * normal(weight.shape, 1, name))


def merged(network: STDiT3) -> dict[str, Tensor]:
    """The full weights that base and adapter stand for, W + (alpha / rank) B A in float64, under published names."""
    state = {name: value.double() for name, value in network.state_dict().items() if ".lora_" not in name}
    adapter = adapter_parameters(network)
    for name in [name for name in state if name.endswith(".base_layer.weight")]:
        layer = "base_model.model." + name.removesuffix(".base_layer.weight")
        down, up = (adapter[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        state[name] += SETTINGS.alpha / SETTINGS.rank * (up @ down)
    return {name.replace(".base_layer.", "."): value.detach() for name, value in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
