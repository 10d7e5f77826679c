"""Check before a run that processes which divide a transformer's tokens get the gradients of a single process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.model_values import TextEmbedding
from vpo_engine.models.diffusers_folder import diffusers_class
from vpo_engine.models.diffusers_sequence import TokenInputs, divide

HEAD_CHANNELS = 16
"""Channels of a head of the small transformer."""
BOUND = 1e-4
"""Largest difference, as a share of the norm; float32 rounds to about 1e-6 here."""
LEAST = 1e-3
"""A gradient is compared with this share of the largest one's norm, if its own is less: that of a norm's bias behind
the keys, for example, is 0 but for rounding."""


def check_division(model: Any, group: SequenceGroup) -> None:
    """Raise ValueError for a ``DiffusersModel`` whose tokens the processes of ``group`` cannot divide.

    A small transformer of its family shows that the installed diffusers gives the gradients of a single process.
    """
    group.check(attention_heads=model.setup.transformer["num_attention_heads"])
    if len(model.facts.tokens.carried) > 1:
        group.check(text_tokens=model.text_rule.max_tokens)
    if group.connected:
        check_gradients(small_model(model, group.count + 1), model.facts.tokens, group)


def small_model(model: Any, heads: int) -> Any:
    """Return a model like ``model`` with a small transformer of one block in float32, for small latents.

    Its latents have as many frames as it has heads. What is as wide as all heads of the model, is so in the small one.
    Parameters are the same in every process.
    """
    small, given = copy.copy(model), model.setup.transformer
    width = given["num_attention_heads"] * given["attention_head_dim"]
    settings = {key: heads * HEAD_CHANNELS if value == width else value for key, value in given.items()}
    settings |= {"num_layers": 1, "num_attention_heads": heads, "attention_head_dim": HEAD_CHANNELS}
    network = diffusers_class(model.facts.transformer).from_config(settings)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    model.prepare_network(network)
    small.network = network.to(model.device).float().eval()
    small.dtype, small.latent_shape = torch.float32, (given["in_channels"], heads, 4, 4)
    return small


def check_gradients(small: Any, tokens: TokenInputs, group: SequenceGroup) -> None:
    """Compare predictions and gradients of a small model with those that it has divided, and leave it divided.

    Raise ValueError, naming the version of diffusers, if they differ.
    """
    expected = _prediction_and_gradients(small)
    divide(small.network, tokens, group)
    prediction, *own = _prediction_and_gradients(small)
    found = [prediction, *(group.sum(gradient) for gradient in own)]
    least = LEAST * max(float(one.norm()) for one in expected)
    worst = max(
        float((one - other).norm() / other.norm().clamp_min(least))
        for one, other in zip(found, expected, strict=True)
    )
    if not worst <= BOUND:
        import diffusers

        raise ValueError(
            f"with diffusers {diffusers.__version__} and torch {torch.__version__}, {group.count} processes that "
            f"divide the tokens of {type(small.network).__name__} get other gradients than one (relative difference "
            f"{worst:.1e}, at most {BOUND:.0e}); install diffusers 0.42.1, or set distributed.sequence_parallel=1"
        )


def _prediction_and_gradients(small: Any) -> list[Tensor]:
    """Return the prediction for fixed inputs, and a fixed sum's gradients; 0 for a parameter without one."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(small.device)

    network: Any = small.network
    tokens, channels = small.text_size(network.config)
    text = TextEmbedding(draw(1, tokens, channels), torch.ones(1, tokens, dtype=torch.bool))
    latents, weights = draw(1, *small.latent_shape), draw(1, *small.latent_shape)
    network.zero_grad()
    prediction = small.predict(network, latents, torch.full((1,), 500.0, device=small.device), text)
    (prediction * weights).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
    return [prediction.detach(), *gradients]
