"""Test stochastic rounding with all of its random numbers, and networks with bfloat16 values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from vpo_engine.memory.rounding import (
    hold_in_bfloat16,
    is_kept_in_float32,
    round_stochastically,
    rounding_offsets,
    take_unrounded,
)

ALL_OFFSETS = torch.arange(1 << 16, dtype=torch.int32)
LARGEST = torch.finfo(torch.bfloat16).max


def of_bits(*bits: int) -> Tensor:
    return torch.tensor([one - (1 << 32) if one >> 31 else one for one in bits], dtype=torch.int32).view(
        torch.float32
    )


def roundings(value: Tensor) -> Tensor:
    """One value under each of the 2^16 offsets."""
    return round_stochastically(value.expand(1 << 16).clone(), ALL_OFFSETS.clone())


def wide_values() -> Tensor:
    """Both signs, all exponents, ties, neighbours of the grid, subnormal numbers, the edge below the largest."""
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(-37, 37, 24)
    values = torch.randn(24, generator=random) * scales
    edges = of_bits(
        0x3F800001, 0x3F80FFFF, 0x3F808000, 0xBF818000, 0x00000001, 0x8000ABCD, 0x007FFFFF, 0x7F7EFFFF
    )
    return torch.cat([values, edges])


def test_the_mean_over_all_offsets_is_the_value_exactly() -> None:
    for value in wide_values():
        assert roundings(value).double().mean() == value.double()


def test_only_the_two_neighbours_come_out_each_in_proportion() -> None:
    for value in wide_values():
        toward_zero = (value.view(torch.int32) & -65536).view(torch.float32)
        away = ((value.view(torch.int32) & -65536) + 65536).view(torch.float32)
        rounded = roundings(value)
        assert ((rounded == toward_zero) | (rounded == away)).all()
        assert (rounded == away).sum() == (value.view(torch.int32) & 0xFFFF)


def test_values_on_the_grid_stay_whatever_the_offset() -> None:
    grid = torch.cat([torch.randn(64), torch.tensor([0.0, -0.0, LARGEST, -LARGEST, math.inf, -math.inf])])
    grid = grid.bfloat16().float()
    for value in grid:
        assert torch.equal(roundings(value).view(torch.int32), value.view(torch.int32).expand(1 << 16))


@pytest.mark.parametrize("bits", [0x7F7F0001, 0x7F7FFFFF, 0xFF7F8000, 0xFF7FFFFF])
def test_finite_values_beyond_the_largest_become_it(bits: int) -> None:
    (value,) = of_bits(bits)
    assert value.isfinite()
    assert (roundings(value) == math.copysign(LARGEST, value)).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF80FFFF])
def test_nan_stays_nan(bits: int) -> None:
    rounded = roundings(of_bits(bits))
    assert rounded.isnan().all()
    assert rounded.bfloat16().isnan().all()


def test_offsets_are_uniform_and_a_function_of_seed_step_and_number() -> None:
    like = torch.empty(256, 1024)
    offsets = rounding_offsets(like, seed=3, step=7, number=11)
    assert offsets.dtype == torch.int32
    assert offsets.shape == like.shape
    assert torch.equal(offsets, rounding_offsets(like, 3, 7, 11))
    for other in ((4, 7, 11), (3, 8, 11), (3, 7, 12), (3, 11, 7)):
        assert not torch.equal(offsets, rounding_offsets(like, *other))
    counts = torch.bincount(offsets.flatten().long() >> 8, minlength=256).double()
    chi_square = float(((counts - 1024) ** 2 / 1024).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    assert offsets.min() >= 0
    assert offsets.max() < 1 << 16


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    network[1].bias.requires_grad_(False)
    network.register_buffer("scale", torch.randn(3))
    return network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
def test_a_held_network_has_the_nearest_values_and_its_own_buffers(weights: str, dtype: torch.dtype) -> None:
    network, before = small_network(), small_network()
    hold_in_bfloat16(network, weights, dtype)  # type: ignore[arg-type]
    for now, old in zip(network.parameters(), before.parameters(), strict=True):
        assert now.dtype == dtype
        assert now.requires_grad == old.requires_grad
        assert torch.equal(now, old.bfloat16().to(dtype))
    assert torch.equal(network.scale, before.scale)


def test_float32_weights_are_left_alone() -> None:
    network, before = small_network(), small_network()
    hold_in_bfloat16(network, "float32", torch.bfloat16)
    for now, old in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, old)


def test_masters_start_from_the_unrounded_weights_once() -> None:
    network, before = small_network(), small_network()
    for _ in range(2):
        hold_in_bfloat16(network, "fp32_master", torch.float32)
    assert not any(vars(parameter) for parameter in copy.deepcopy(network).parameters())
    weight, frozen = network[0].weight, network[1].bias
    assert torch.equal(take_unrounded(weight), before[0].weight)
    assert torch.equal(take_unrounded(weight), weight)
    assert take_unrounded(weight).data_ptr() != weight.data_ptr()
    assert torch.equal(take_unrounded(frozen), frozen)


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
def test_modules_that_must_stay_float32_are_stored_unrounded(weights: str) -> None:
    """They are named by any part of their path; a name that only contains theirs is another one."""
    network = nn.ModuleDict({"norm": small_network(), "norm1": small_network()}).bfloat16()
    with torch.no_grad():
        network["norm"][0].weight.data = before = small_network()[0].weight.detach()
    hold_in_bfloat16(network, weights, torch.bfloat16, ["norm", "absent"])  # type: ignore[arg-type]
    assert torch.equal(network["norm"][0].weight, before)
    assert {parameter.dtype for parameter in network["norm"].parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in network["norm1"].parameters()} == {torch.bfloat16}
    assert all(map(is_kept_in_float32, network["norm"].parameters()))
    assert not any(map(is_kept_in_float32, network["norm1"].parameters()))


def test_float32_weights_need_no_module_to_be_kept() -> None:
    network = small_network()
    hold_in_bfloat16(network, "float32", torch.bfloat16, ["0"])
    assert not any(map(is_kept_in_float32, network.parameters()))
