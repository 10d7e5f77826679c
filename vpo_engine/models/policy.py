"""The form in which a policy's weights are held: their type, a base in few bits, and an adapter."""

from __future__ import annotations

import torch
from torch import nn

from vpo_engine.config import Config
from vpo_engine.memory.quantised_base import HeldBase, frozen_layers
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.models.lora import chosen_targets, inject_adapter
from vpo_engine.video_model import ModelCard


def held_base(config: Config, card: ModelCard, device: torch.device | None = None) -> HeldBase:
    """Return how a run of this configuration holds the base of its policy."""
    return HeldBase(config.memory.base_bits, device, card.float32_modules)


def prepare_policy(
    network: nn.Module,
    config: Config,
    card: ModelCard,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> str:
    """Hold a loaded network as ``config.memory`` says, and give it a fresh adapter under model.lora.

    dtype: that of the arithmetic. Return a line for the user about what is trained, "" if all weights are. The adapter
    is added last, so that its float32 weights are never rounded. Raise ValueError if the adapter's targets do not fit.
    """
    lora = config.model.lora
    if lora is None:
        hold_in_bfloat16(network, config.memory.weights, dtype, card.float32_modules)
        return ""
    network.requires_grad_(False)
    held_base(config, card, device).hold(network)
    hold_in_bfloat16(network, config.memory.weights, dtype, card.float32_modules)
    layers = inject_adapter(network, lora, chosen_targets(lora, card), config.seed, config.model.policy)
    trained, total = count_parameters(network)
    return (
        f"LoRA of rank {lora.rank} and scale {lora.scale:g} (alpha / rank) in {len(layers)} layers, with {trained:,} "
        f"of {total:,} parameters ({trained / total:.2%}){_bits(network)}"
    )


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Return the number of parameters that are trained, and of all; those in few bits count as what they stand for."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    frozen = sum(layer.numel for layer in frozen_layers(network))
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts) + frozen


def _bits(network: nn.Module) -> str:
    layers = frozen_layers(network)
    if not layers:
        return ""
    size = sum(buffer.nbytes for layer in layers for buffer in layer.buffers()) / 2**20
    return f"; {len(layers)} layers of the base are held in {layers[0].bits} bits ({size:,.1f} MiB)"
