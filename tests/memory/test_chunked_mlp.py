"""Test the MLP in parts: it is as exact as the whole MLP, and has one part's hidden activations at a time."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from block_case import Case, Storages
from torch import Tensor

from vpo_engine.config import ActivationCheckpointing
from vpo_engine.memory.checkpointing import in_parts
from vpo_engine.models.opensora.embeddings import Mlp

POLICIES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
MEASURED = 4e-7
"""Largest relative norm of what parts change in a float32 gradient, over the cases below: sums in another order."""
PARTS = [3, 20, 64]
"""Parts of unequal sizes, of one patch each, and more than there are patches."""


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_the_prediction_differs_by_rounding_of_products_at_most(temporal: bool, parts: int) -> None:
    """A library may sum a product of few rows in another order than that of many."""
    for dtype, most in ((torch.float64, 1e-15), (torch.float32, 1e-7)):
        case = Case(temporal, dtype=dtype)
        assert relative(case.forward("none", parts), case.forward("none")) <= most


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_with_and_without_grad_the_prediction_is_the_same_bits(temporal: bool, parts: int) -> None:
    """So that policy and reference agree right after a refresh."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(temporal, dtype=dtype)
        before = case.x.clone()
        with torch.no_grad():
            expected = case.forward("none", parts)
        assert torch.equal(case.x, before)
        for checkpointing in POLICIES:
            assert torch.equal(case.forward(checkpointing, parts), expected)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_gradients_are_as_near_to_float64_as_before(temporal: bool, parts: int) -> None:
    """In float64 a library's product of few rows may round otherwise than that of many."""
    exact = Case(temporal, dtype=torch.float64).outcome("none")
    exact_parts = Case(temporal, dtype=torch.float64).outcome("none", parts)
    for one, other in zip(exact, exact_parts, strict=True):
        assert relative(other, one) <= 1e-15
    whole = Case(temporal).outcome("none")
    for checkpointing in POLICIES:
        for found, before, truth in zip(
            Case(temporal).outcome(checkpointing, parts), whole, exact, strict=True
        ):
            assert relative(found, before) <= MEASURED
            assert relative(found, truth) <= 1.5 * relative(before, truth)


@pytest.mark.parametrize("parts", [3, 20])
def test_policies_agree_bit_for_bit_in_parts(parts: int) -> None:
    for temporal in (False, True):
        expected = Case(temporal).outcome("none", parts)
        for checkpointing in POLICIES[1:]:
            found = Case(temporal).outcome(checkpointing, parts)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_patches_that_do_not_divide_are_all_covered_once() -> None:
    seen: list[int] = []

    def double(x: Tensor, by: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return x * by

    x, two = torch.randn(2, 10, 3), torch.tensor(2.0)
    with torch.no_grad():
        out = in_parts(double, x.clone(), (two,), dim=1, parts=4)
    assert torch.equal(out, 2 * x)
    assert seen == [3, 3, 2, 2]
    seen.clear()
    with torch.no_grad():
        in_parts(double, x.clone(), (two,), dim=1, parts=99)
    assert seen == [1] * 10


@pytest.mark.parametrize("grad", [False, True])
def test_a_part_is_computed_once_forward_and_once_backward(
    monkeypatch: pytest.MonkeyPatch, grad: bool
) -> None:
    sizes: list[int] = []
    forward = Mlp.forward

    def counted(self: Mlp, x: Tensor) -> Tensor:
        sizes.append(x.shape[2])
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", counted)
    for checkpointing in POLICIES:
        case = Case(temporal=False)
        sizes.clear()
        with torch.set_grad_enabled(grad):
            out = case.forward(checkpointing, 4)
        assert sizes == [5] * 4
        if grad:
            out.sum().backward()
            assert sizes == [5] * 8


def large(temporal: bool = False) -> Case:
    """Many more tokens than channels, as in a video."""
    return Case(temporal, B=1, T=10, S=96, C=32, H=2, lengths=(5,))


@pytest.mark.parametrize("checkpointing", POLICIES)
def test_hidden_activations_exist_one_part_at_a_time(checkpointing: ActivationCheckpointing) -> None:
    parts, case = 8, large()
    hidden = case.N * case.M * 4
    with Storages() as storages:
        out = case.forward(checkpointing, parts)
        assert storages.most[hidden // parts] <= 2  # before and after the activation
        out.sum().backward()
    assert storages.most[hidden] == 0
    assert storages.most[hidden // parts] <= 3  # and a gradient


@torch.no_grad()
def test_without_grad_the_peak_falls_too() -> None:
    case = large()
    unit = case.x.nbytes
    for parts, most in ((1, 10.1), (8, 7.1)):  # the MLP's and the attention's
        with Storages(case.shared()) as storages:
            case.forward("none", parts)
        assert 0.97 * most < storages.peak / unit < most


@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
@pytest.mark.parametrize(
    ("checkpointing", "parts", "most"),
    [
        ("block", 1, 31),
        ("block", 8, 19),
        ("all_but_attention", 1, 31),
        ("all_but_attention", 8, 19),
        ("pointwise", 1, 31),
        ("pointwise", 8, 19),
    ],
)
def test_what_one_blocks_backward_needs_at_once(
    temporal: bool, checkpointing: ActivationCheckpointing, parts: int, most: int
) -> None:
    """In values per token and channel, with what the policy kept, beside the block's input and two gradients."""
    case = large(temporal)
    gradients = [torch.zeros_like(t) for t in (case.x, case.text, case.time, *case.block.parameters())]
    for tensor, gradient in zip(
        (case.x, case.text, case.time, *case.block.parameters()), gradients, strict=True
    ):
        tensor.grad = gradient
    with Storages([*case.shared(), *gradients]) as storages:
        out = case.forward(checkpointing, parts)
        start = torch.ones_like(out)
        storages.peak = 0
        out.backward(start)
    assert most - 1 < storages.peak / case.x.nbytes - 2 < most
