"""The reference under an adapter: a second copy of the adapter over the very same base, of any type and in few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vpo_kernels import paired_dpo_loss

from vpo_engine.config import LoraConfig
from vpo_engine.memory.checkpointing import checkpointed
from vpo_engine.memory.quantised_base import BaseBits, HeldBase, frozen_layers
from vpo_engine.models.lora import adapter_parameters, inject_adapter
from vpo_engine.reference.store import build_reference

Call = Callable[[Callable[..., Any]], Tensor]


def wan(dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...], Call]:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return network, ("to_q", "to_v", "net.2"), _call("hidden_states", (2, 4, 2, 8, 8), dtype, torch.float32)


def cogvideox(dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...], Call]:
    from diffusers import CogVideoXTransformer3DModel

    network = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=8,
    )
    return (
        network,
        ("to_k", "to_out.0", "norm1.linear"),
        _call("hidden_states", (2, 2, 4, 8, 8), dtype, torch.int64),
    )


def _call(name: str, shape: tuple[int, ...], dtype: torch.dtype, times: torch.dtype) -> Call:
    random = torch.Generator().manual_seed(3)
    latents, text = (torch.randn(size, generator=random).to(dtype) for size in (shape, (2, 8, 16)))
    inputs = {name: latents, "timestep": torch.tensor([3, 700], dtype=times), "encoder_hidden_states": text}
    return lambda network: network(**inputs, return_dict=False)[0]


def policy_of(
    family: Callable[..., tuple[nn.Module, tuple[str, ...], Call]], dtype: torch.dtype, bits: BaseBits | None
) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    network, targets, call = family(dtype)
    with torch.no_grad():
        for parameter in network.parameters():  # all of it matters, whatever starts at zero
            parameter.add_(0.05 * torch.randn(parameter.shape))
    HeldBase(bits).hold(network)
    network.eval().to(dtype)
    inject_adapter(network, LoraConfig(rank=3), targets, seed=0)
    move(network, 0)
    return network, call


@torch.no_grad()
def move(network: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for weight in adapter_parameters(network).values():
        weight.add_(0.02 * torch.randn(weight.shape, generator=random))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [wan, cogvideox])
def test_the_reference_is_the_policy_at_the_refresh_bit_for_bit(
    family: Callable[..., Any], dtype: torch.dtype, bits: BaseBits | None
) -> None:
    policy, call = policy_of(family, dtype, bits)
    reference = build_reference("adapter", policy)
    for seed in (1, 2):
        at_refresh, frozen = call(policy), call(reference)
        assert at_refresh.requires_grad
        assert not frozen.requires_grad
        assert torch.equal(at_refresh, frozen)
        winner, loser = torch.randn_like(frozen[:1]), torch.randn_like(frozen[:1])
        out = paired_dpo_loss(*at_refresh.detach().chunk(2), *frozen.chunk(2), winner, loser, beta=5000.0)
        assert float(out.margin) == 0.0
        move(policy, seed)
        assert not torch.equal(call(policy), at_refresh)
        assert torch.equal(call(reference), at_refresh)
        reference.refresh(policy)
        assert torch.equal(call(reference), call(policy))


@pytest.mark.parametrize("bits", [8, 4])
def test_policy_and_reference_hold_the_same_codes_and_the_reference_stores_the_adapter_alone(
    bits: BaseBits,
) -> None:
    policy, _ = policy_of(wan, torch.bfloat16, bits)
    reference = build_reference("adapter", policy)
    mine, theirs = frozen_layers(policy), frozen_layers(reference.network)
    assert len(mine) == len(theirs) == 20
    for one, other in zip(mine, theirs, strict=True):
        assert one is not other
        assert all(a is b for a, b in zip(one.buffers(), other.buffers(), strict=True))
    codes = {id(buffer) for layer in mine for buffer in layer.buffers()}
    assert codes < {id(tensor) for tensor in reference.tensors()}
    stored = reference.state_dict()
    assert sum(".lora_" in name for name in stored) == len(adapter_parameters(policy))
    assert {tensor.dtype for name, tensor in stored.items() if ".lora_" in name} == {torch.float32}
    assert not any(tensor.dtype == torch.uint8 for tensor in stored.values())


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_gradient_of_an_adapter_is_that_over_the_dequantised_base(bits: BaseBits | None) -> None:
    """In float64, against a network of ordinary layers, and with blocks computed again in the backward pass."""
    policy, call = policy_of(wan, torch.float64, bits)
    plain = copy.deepcopy(policy)
    for name, layer in list(plain.named_modules()):
        if layer in frozen_layers(plain):
            parent, _, child = name.rpartition(".")
            ordinary = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
            ordinary.weight = nn.Parameter(layer.dequantised(torch.float64), requires_grad=False)
            ordinary.bias = layer.bias
            setattr(plain.get_submodule(parent), child, ordinary)
    again = copy.deepcopy(policy)
    for block in again.blocks:
        run = block.forward
        block.forward = lambda *inputs, run=run: checkpointed(run, *inputs, checkpointing="pointwise")
    gradients = []
    for network in (policy, plain, again):
        call(network).square().mean().backward()
        gradients.append([weight.grad for weight in adapter_parameters(network).values()])
    for mine, expected, repeated in zip(*gradients, strict=True):
        assert mine.abs().sum() > 0
        assert (mine - expected).norm() <= 1e-12 * expected.norm()
        assert torch.equal(mine, repeated)
