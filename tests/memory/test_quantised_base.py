"""A frozen base in 8 or 4 bits: its error, its products and gradients, what it keeps, and how it is loaded."""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_linear_map, get_4bit_type
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpo_engine.data.sprites.assets import WEIGHTS, load_policy
from vpo_engine.memory import quantised_base
from vpo_engine.memory.quantised_base import (
    BLOCK,
    BaseBits,
    FrozenLinear,
    HeldBase,
    block_linears,
    frozen_layers,
)
from vpo_engine.models.opensora.load import load_stdit3

SHAPES = [(2, 64), (17, 96), (64, 34), (3, 130), (5, 33), (1, 1)]
"""Sides that blocks do not fill, too: in (17, 96) a block lies in two rows; (5, 33) has an odd number of weights."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer.requires_grad_(False)


def levels(bits: BaseBits) -> Tensor:
    """The numbers, in float64, of which a weight of either format is one, times its block's largest magnitude."""
    return (create_linear_map(signed=True) if bits == 8 else get_4bit_type("nf4", device="cpu")).double()


# the rounding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_the_nearest_level_of_its_block(
    shape: tuple[int, int], bits: BaseBits, dtype: torch.dtype
) -> None:
    """Computed here in float64, block by block over the whole matrix. The product of level and scale is rounded once.

    Near the middle between two levels bitsandbytes may take either: in 4 bits within float32's rounding, in 8 bits its
    search on CPUs is coarser, and is held here to a hundredth of the distance between levels.
    """
    weight = normal(*shape)
    flat = weight.double().flatten()
    scale = torch.cat([block.abs().max().expand(len(block)) for block in flat.split(BLOCK)])
    nearest = (flat / scale - levels(bits)[:, None]).abs().amin(0) * scale
    found = FrozenLinear(linear(weight), bits).dequantised(dtype)
    assert found.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8 * scale
    rounding += 0.01 / 127 * scale if bits == 8 else 0.0
    assert bool(((found.double().flatten() - flat).abs() <= nearest + rounding).all())


def test_eight_bits_round_less_than_the_rows_and_the_dynamic_map_of_bitsandbytes() -> None:
    weight = 0.02 * normal(512, 1024)

    def error(found: Tensor) -> float:
        return float((found.double() - weight.double()).norm() / weight.double().norm())

    ours = error(FrozenLinear(linear(weight), 8).dequantised(torch.float32))
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    dynamic = bnb.functional.dequantize_blockwise(
        *bnb.functional.quantize_blockwise(weight, code=bnb.functional.create_dynamic_map(), blocksize=BLOCK)
    )
    assert ours == pytest.approx(0.0059, abs=1e-4)
    assert error(bnb.functional.int8_vectorwise_dequant(codes, scales)) > 1.25 * ours
    assert error(dynamic) > 1.5 * ours


def test_the_weight_is_that_of_bitsandbytes_own_layer_of_four_bits() -> None:
    weight, bias, x = 0.02 * normal(48, 128), normal(48, seed=1), normal(3, 7, 128, seed=2)
    ours = FrozenLinear(linear(weight, bias), 4)
    theirs = bnb.nn.Linear4bit(
        128, 48, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    theirs.load_state_dict({"weight": weight, "bias": bias})
    theirs = theirs.to("cpu")
    assert torch.equal(theirs.weight.data.flatten(), ours.weight.flatten())
    assert torch.equal(
        bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state),
        ours.dequantised(torch.float32),
    )
    exact = F.linear(x.double(), ours.dequantised(torch.float32).double(), bias.double())
    found, own = ours(x), theirs(x)
    assert (found.double() - exact).norm() <= 1e-6 * exact.norm()
    # On CPUs that multiply in bfloat16 their layer rounds its factors to it, by 2^-9 at most each.
    assert (own.double() - found.double()).norm() <= 2.0**-8 * exact.norm()


def test_the_product_is_nearer_to_the_exact_one_than_that_of_bitsandbytes_own_layer_of_eight_bits() -> None:
    weight, x = 0.02 * normal(48, 256), normal(64, 256, seed=2)
    theirs = bnb.nn.Linear8bitLt(256, 48, bias=False, has_fp16_weights=False, threshold=0.0)
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    exact = F.linear(x.double(), weight.double())
    ours = (FrozenLinear(linear(weight), 8)(x) - exact).norm() / exact.norm()
    assert ours < 0.007
    assert ours < (theirs(x) - exact).norm() / exact.norm() < 0.03  # theirs rounds the input as well


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    network = load_policy()
    with torch.no_grad():
        network.spatial_blocks[1].mlp.fc2.weight[3, 4] = torch.nan
    with pytest.raises(
        ValueError, match=r"weight of spatial_blocks\.1\.mlp\.fc2 .*not finite.*memory\.base_bits"
    ):
        HeldBase(4).hold(network)


# the product and its gradient


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_the_ordinary_product_with_its_weights(
    bits: BaseBits, dtype: torch.dtype, autocast: bool
) -> None:
    layer = FrozenLinear(linear(normal(24, 96), normal(24, seed=1)), bits)
    x = normal(2, 5, 96, seed=2).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
        computed = torch.bfloat16 if autocast else dtype
        expected = F.linear(y, layer.dequantised(computed), layer.bias.to(computed))
    assert found.dtype == expected.dtype == computed
    assert torch.equal(found, expected)
    gradient = normal(*found.shape, seed=3).to(found)
    found.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(x.grad, y.grad)
    assert x.grad.dtype == dtype
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), found)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_of_the_input_are_those_of_the_function(bits: BaseBits) -> None:
    layer = FrozenLinear(linear(normal(7, 65), normal(7, seed=1)), bits)
    x = normal(3, 65, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-5, atol=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_is_kept_for_the_backward_pass_and_no_dequantised_weight_lives_on(
    bits: BaseBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, made, kept = FrozenLinear(linear(normal(24, 96)), bits), [], []
    decoded = quantised_base.decoded

    def spy(*arguments: object) -> Tensor:
        found = decoded(*arguments)  # type: ignore[arg-type]
        made.append(weakref.ref(found.untyped_storage()))
        return found

    monkeypatch.setattr(quantised_base, "decoded", spy)
    x = normal(5, 96).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = layer(x)
    assert (len(made), kept) == (1, [])
    assert made[0]() is None
    out.sum().backward()
    assert len(made) == 2
    assert made[1]() is None


@pytest.mark.parametrize("bits", [8, 4])
def test_casts_and_copies_of_the_network_leave_the_codes_alone(bits: BaseBits) -> None:
    layer = FrozenLinear(linear(normal(24, 96), normal(24)), bits)
    before = {name: (buffer.dtype, buffer.clone()) for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16).half().double().bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name][0]
        assert torch.equal(buffer, before[name][1])
    assert list(layer.state_dict()) == ["bias"]


# the layers of a network


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [wan, load_policy])
def test_the_linear_layers_of_blocks_are_held_and_all_others_stay(make: object, bits: BaseBits) -> None:
    network = make()  # type: ignore[operator]
    before = dict(network.named_parameters())
    expected = {name: linear.weight.shape for name, linear in block_linears(network).items()}
    assert HeldBase(bits).hold(network) == len(expected) > 0
    held = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLinear)}
    assert {name: torch.Size((one.out_features, one.in_features)) for name, one in held.items()} == expected
    left = dict(network.named_parameters())
    assert before.keys() - left.keys() == {f"{name}.weight" for name in expected}
    assert all(parameter is before[name] for name, parameter in left.items())
    nbytes = sum(buffer.nbytes for one in held.values() for buffer in one.buffers())
    count = sum(shape.numel() for shape in expected.values())
    tables = 0 if bits == 4 else 1024 * len(held)
    assert count * (bits / 8 + 4 / BLOCK) <= nbytes - tables < count * (bits / 8 + 4 / BLOCK) + 8 * len(held)
    assert HeldBase(bits).hold(network) == 0


def test_modules_that_need_their_precision_are_left_alone() -> None:
    network = wan()
    assert HeldBase(4, keep=("attn2", "net")).hold(network) == 2 * 4
    assert {name.split(".")[2] for name, one in network.named_modules() if isinstance(one, FrozenLinear)} == {
        "attn1"
    }


def test_layers_are_rounded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full weights of a layer are gone when the next one is read."""
    network = load_policy()
    weights = [weakref.ref(one.weight.untyped_storage()) for one in block_linears(network).values()]
    encoded, alive = quantised_base.encoded, []

    def spy(*arguments: object) -> object:
        alive.append(sum(one() is not None for one in weights))
        return encoded(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(quantised_base, "encoded", spy)
    HeldBase(4).hold(network)
    assert alive == list(range(len(weights), 0, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loader_never_copies_what_is_rounded(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's folder in either type gives the same layers as rounding a network that was loaded whole."""
    (tmp_path / "config.json").write_bytes((WEIGHTS / "policy" / "config.json").read_bytes())
    saved = {
        key: value.to(dtype) for key, value in load_file(WEIGHTS / "policy" / "model.safetensors").items()
    }
    save_file(saved, tmp_path / "model.safetensors")
    whole = load_stdit3(tmp_path)
    names = HeldBase(4).mapped(whole)
    encoded, seen = quantised_base.encoded, []
    monkeypatch.setattr(
        quantised_base, "encoded", lambda weight, *more: seen.append(weight.dtype) or encoded(weight, *more)
    )
    network = load_stdit3(tmp_path, HeldBase(4))
    assert seen == [dtype] * len(names)
    HeldBase(4).hold(whole)
    assert network.state_dict().keys() == whole.state_dict().keys()
    for one, other in zip(network.parameters(), whole.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    for one, other in zip(frozen_layers(network), frozen_layers(whole), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.scales, other.scales)


def test_without_bits_nothing_is_held() -> None:
    network = load_policy()
    names = [name for name, _ in network.named_parameters()]
    assert HeldBase().hold(network) == 0
    assert HeldBase().mapped(network) == frozenset()
    assert [name for name, _ in network.named_parameters()] == names
    assert re.search("bits=4", repr(FrozenLinear(nn.Linear(2, 2), 4)))
