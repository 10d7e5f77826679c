"""VideoScore in 8 and 4 bits: what is stored, how far scores move, and what is refused."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_videoscore import CAT, ODD, TINY, clips, stacked, write_checkpoint, write_weights
from torch import Tensor, nn

from vpo_engine.rewards.quantize import Bits, QuantisedLinear
from vpo_engine.rewards.videoscore import VideoScore

PROMPTS = [CAT, ODD, "a dog", "rain", "two birds", "a cat jumps"]
SCORE_RMS = {8: 0.02, 4: 0.35}
"""Of the tiny random model, whose scores spread by 0.1 to 0.3 over clips; measured are 0.013 and 0.28. Its sums run
over 16 to 128 weights, those of the published model over 1024 to 14336, where rounding averages out."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("quantised") / "tiny")


def load(folder: Path, bits: Bits = 16, dtype: torch.dtype = torch.float32) -> VideoScore:
    return VideoScore.from_pretrained(folder, dtype=dtype, bits=bits)


def scores(scorer: VideoScore) -> Tensor:
    return stacked(scorer.score(clips(6), PROMPTS))


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def quantised(network: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantisedLinear)}


@pytest.mark.parametrize("shape", [(3, 64), (17, 96), (256, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_within_half_a_step_of_their_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = QuantisedLinear(weight, None, 8).weight(torch.float32)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    slack = 1 + 127 * 2.0**-10  # the weight in float16, up to 127 steps, is off by 2**-11 of itself
    assert bool(((found - weight.float()).abs() <= slack * step / 2).all())


@pytest.mark.parametrize("shape", [(2, 64), (17, 96), (64, 34), (3, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_the_nearest_levels_of_their_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every weight comes back as the nearest level times the largest weight of its 64, computed here in float64.

    Blocks are counted over the whole matrix, across the ends of rows: (17, 96) has a block that lies in two rows. With
    AVX-512, bitsandbytes 0.50.2 quantises such a matrix rightly (all codes are the nearest ones) but dequantises it
    wrongly: it begins a new block with every row, and takes the scale of another block. ``QuantisedLinear`` therefore
    never asks it for rows that are not whole blocks. A product of level and scale is rounded once to ``dtype``.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = QuantisedLinear(weight, None, 4)
    levels, flat = bnb.functional.get_4bit_type("nf4", device="cpu").double(), weight.double().flatten()
    scale = torch.cat([block.abs().max().expand(len(block)) for block in flat.split(64)])
    nearest = (flat / scale).sub(levels[:, None]).abs().amin(0)
    found = layer.weight(dtype).double().flatten()
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8 * scale
    assert bool(((found - flat).abs() <= nearest * scale + rounding).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_ordinary_product_with_its_weights(bits: Bits, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 96, generator=generator).to(dtype)
    bias = nn.Parameter(torch.randn(24, generator=generator).to(dtype))
    layer = QuantisedLinear(weight, bias, bits)
    x = torch.randn(2, 5, 96, generator=generator).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight(dtype), bias))
    assert layer.weight(dtype).dtype == dtype
    x[0] *= 1000  # activations rounded together with these would lose all their digits
    torch.testing.assert_close(layer(x[1:]), layer(x)[1:])  # products over more rows may sum in another order


def test_bytes() -> None:
    weight = torch.randn(256, 512)
    held = {
        bits: sum(tensor.nbytes for tensor in QuantisedLinear(weight, None, bits).buffers())
        for bits in (8, 4)
    }
    assert held == {8: 256 * 512 + 4 * 256, 4: 256 * 512 // 2 + 4 * 256 * 512 // 64}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_stay_close_and_are_the_same_every_time(folder: Path, bits: Bits, dtype: torch.dtype) -> None:
    scorer = load(folder, bits, dtype)
    found = scores(scorer)
    assert 0 < rms(found - scores(load(folder, 16, dtype))) < SCORE_RMS[bits]
    assert torch.equal(found, scores(scorer))
    assert torch.equal(found, scores(load(folder, bits, dtype)))


def test_eight_bits_are_nearer_than_with_quantised_activations(folder: Path) -> None:
    """The layer of bitsandbytes rounds activations too, and moves scores twice as far."""
    exact, theirs = scores(load(folder)), load(folder)
    for name in quantised(load(folder, 8).network):
        linear = theirs.network.get_submodule(name)
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        layer.weight = bnb.nn.Int8Params(
            linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
        )
        parent, _, child = name.rpartition(".")
        setattr(theirs.network.get_submodule(parent), child, layer.to("cpu").eval())
    assert rms(scores(load(folder, 8)) - exact) < 0.6 * rms(scores(theirs) - exact)


@pytest.mark.parametrize("bits", [8, 4])
def test_only_matrices_behind_the_vision_tower_are_quantised(folder: Path, bits: Bits) -> None:
    plain, network = load(folder).network, load(folder, bits).network
    found = quantised(network)
    expected = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and ("text_model" in name or "connector" in name)
    }
    assert found.keys() == expected
    assert len(expected) == 31
    kept = dict(network.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(kept[name], parameter), name
    saved = sum(plain.get_submodule(name).weight.nbytes for name in expected)
    held = sum(tensor.nbytes for layer in found.values() for tensor in layer.buffers())
    assert held < saved * {8: 0.30, 4: 0.17}[bits], "of float32; the rest are scales"


def test_a_gradient_reaches_the_pixels(folder: Path) -> None:
    def gradient(bits: Bits) -> Tensor:
        scorer = load(folder, bits)
        pixels = scorer.preprocess(clips(1)).requires_grad_()
        scorer.logits(pixels, [CAT]).sum().backward()
        assert pixels.grad is not None
        return pixels.grad

    exact, found = gradient(16), gradient(8)
    assert float(F.cosine_similarity(exact.flatten(), found.flatten(), dim=0)) > 0.98


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_stays_strict(tmp_path: Path, bits: Bits) -> None:
    folder, weights = write_checkpoint(tmp_path / "tiny", shards=1), load_file(TINY / "weights.safetensors")
    key = next(name for name in weights if "text_model.layers.0.mlp.up_proj" in name)
    write_weights(folder, {name: value for name, value in weights.items() if name != key})
    with pytest.raises(ValueError, match=f"missing {key}"):
        load(folder, bits)
    write_weights(folder, weights | {key: weights[key][:-1].contiguous()})
    with pytest.raises(ValueError, match=rf"{key} is \[63, 32\], expected \[64, 32\]"):
        load(folder, bits)


def test_other_numbers_of_bits_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="bits is 5, expected 16, 8 or 4"):
        load(folder, 5)  # type: ignore[arg-type]
