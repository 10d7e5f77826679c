"""Test the int8 format: its error on Gaussian weights, its scales, and matrices of unusual shapes and values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vpo_engine.reference.weights import Int8Weight, Scratch


def encoded(weight: Tensor) -> Tensor:
    held = Int8Weight(weight)
    scratch = Scratch()
    scratch.numel = held.scratch_numel
    return held.decode(weight.dtype, scratch).clone()


def relative_error(found: Tensor, weight: Tensor) -> float:
    return float((found.double() - weight.double()).norm() / weight.double().norm())


@pytest.fixture
def gaussian() -> Tensor:
    return 0.02 * torch.randn(1152, 1152, generator=torch.Generator().manual_seed(0))


def test_error_on_gaussian_weights_is_half_of_a_blockwise_dynamic_maps(gaussian: Tensor) -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    error = relative_error(encoded(gaussian), gaussian)
    theirs = relative_error(dequantize_blockwise(*quantize_blockwise(gaussian, blocksize=256)), gaussian)
    assert error == pytest.approx(0.0059, abs=1e-4)
    assert theirs == pytest.approx(0.0108, abs=2e-4)


def test_bfloat16_scales_cost_less_than_half_a_percent_of_accuracy(gaussian: Tensor) -> None:
    """Against the same format with float32 scales. A scale is off by 2^-9 at most, and so is the step."""
    groups = gaussian.view(-1, 64)
    scales = groups.abs().amax(dim=1, keepdim=True) / 127
    finest = ((groups / scales).round() * scales).view_as(gaussian)
    found = encoded(gaussian)
    assert 1 < relative_error(found, gaussian) / relative_error(finest, gaussian) < 1.005
    assert (((found - gaussian).view(-1, 64) / scales).abs() <= 0.5 * (1 + 2**-8)).all()


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_rows_that_groups_do_not_fill(columns: int) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    found = encoded(weight)
    assert found.shape == weight.shape
    for start in range(0, columns, 64):
        group = weight[:, start : start + 64]
        step = group.abs().amax(dim=1, keepdim=True) / 127
        assert ((found[:, start : start + 64] - group).abs() <= 0.51 * step).all()


def test_a_row_of_a_matrix_is_encoded_by_itself(gaussian: Tensor) -> None:
    """So that a process that holds some rows encodes them without the others."""
    assert torch.equal(encoded(gaussian)[256:512], encoded(gaussian[256:512].clone()))


def test_zeros_stay_zeros_and_the_smallest_and_the_largest_weights_survive() -> None:
    assert torch.equal(encoded(torch.zeros(3, 64)), torch.zeros(3, 64))
    for size in (1e-30, 1e30):
        weight = size * torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
        assert relative_error(encoded(weight), weight) < 0.007


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    weight = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    weight[1, 70] = bad
    found = encoded(weight)
    assert found[1, 64:].isnan().all()
    assert found[0].isfinite().all()
    assert found[1, :64].isfinite().all()


def test_decoding_to_bfloat16_rounds_once(gaussian: Tensor) -> None:
    held = Int8Weight(gaussian)
    scratch = Scratch()
    scratch.numel = held.scratch_numel
    product = held._codes.double() * held._scales.double().unsqueeze(-1)
    expected = product.flatten(1).bfloat16()
    assert torch.equal(held.decode(torch.bfloat16, scratch), expected)
