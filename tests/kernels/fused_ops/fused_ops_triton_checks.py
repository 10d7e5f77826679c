"""Checks of the fused ops' Triton kernels in Triton's interpreter; test_interpreted.py runs them."""

from __future__ import annotations

import pytest
import torch
from cases import (
    HEADS,
    LENGTHS,
    MODULATED,
    Case,
    assert_as_good_as_eager,
    modulated,
    normed_heads,
    residual,
    results,
    short_sequences,
)
from vpo_kernels.fused_ops import interpreted
from vpo_kernels.gated_residual import gated_residual
from vpo_kernels.modulated_norm import modulated_norm
from vpo_kernels.triton_parts import sum_chunks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_this_is_the_interpreter() -> None:
    assert interpreted()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("x_shape", "shape"), MODULATED)
@pytest.mark.parametrize("make", [modulated, residual])
def test_modulation(make, x_shape, shape, strided: bool) -> None:
    assert_as_good_as_eager(make(x_shape, shape, torch.float32, strided), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [modulated, residual])
def test_modulation_in_16_bits(make, dtype: torch.dtype) -> None:
    assert_as_good_as_eager(make((2, 3, 5, 72), (2, 1, 1, 72), dtype, True), "triton")


def test_sums_over_many_chunks() -> None:
    """The numbers are whole, so that any order of addition gives the same bits unless one is lost or added twice."""
    partial = torch.randint(-9, 9, (3, 300, 70), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(sum_chunks(partial, torch.float32), partial.sum(1))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("shape", HEADS)
def test_normed_heads(shape, rope: bool) -> None:
    assert_as_good_as_eager(normed_heads(shape, torch.float32, rope), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_normed_heads_exchanged_in_memory(dtype: torch.dtype) -> None:
    assert_as_good_as_eager(normed_heads((3, 5, 2, 72), dtype, rope=True, exchanged=True), "triton")


def test_odd_channels_without_rope() -> None:
    assert_as_good_as_eager(normed_heads((3, 4, 2, 7), torch.float32, rope=False), "triton")


@pytest.mark.parametrize("length", LENGTHS)
def test_every_packing(length: int) -> None:
    """A tile holds one problem, or several, and the last tile is not full."""
    assert_as_good_as_eager(
        short_sequences((3 if length < 20 else 1, length, 3, 72), torch.float32), "triton"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [5, 20])
def test_packing_in_16_bits(length: int, dtype: torch.dtype) -> None:
    assert_as_good_as_eager(short_sequences((2, length, 2, 72), dtype), "triton")


@pytest.mark.parametrize("channels", [1, 8, 64, 128])
def test_head_sizes_and_exchanged_views(channels: int) -> None:
    assert_as_good_as_eager(short_sequences((4, 5, 3, channels), torch.float32, exchanged=True), "triton")


def test_saturated_softmax() -> None:
    """Scores are in the hundreds, so that the largest must be subtracted before exp."""
    assert_as_good_as_eager(short_sequences((3, 10, 2, 64), torch.float32, spread=300.0), "triton")


def test_sequences_do_not_see_each_other() -> None:
    """The other sequences in a tile do not change a sequence's output."""
    case = short_sequences((3, 5, 4, 72), torch.float32)
    q, k, v = (tensor.detach().clone() for tensor in case.view(*case.inputs))
    before = case.operation(q, k, v, backend="triton")
    for tensor in (q, k, v):
        tensor[0, :, 1] *= 1e4
    after = case.operation(q, k, v, backend="triton")
    assert not torch.equal(before[0, :, 1], after[0, :, 1])
    after[0, :, 1] = before[0, :, 1]
    assert torch.equal(before, after)


CASES = {
    "modulated_norm": lambda: modulated((2, 5, 9, 33), (2, 1, 1, 33), torch.float32, True),
    "gated_residual": lambda: residual((2, 5, 9, 33), (2, 5, 1, 33), torch.float32, True),
    "qk_norm_rope": lambda: normed_heads((6, 5, 4, 72), torch.float32, True, True),
    "temporal_attention": lambda: short_sequences((4, 5, 3, 72), torch.float32, True),
}


@pytest.mark.parametrize("name", CASES)
def test_bitwise_rerun(name: str) -> None:
    case: Case = CASES[name]()
    assert all(
        torch.equal(a, b) for a, b in zip(*(results(case, backend="triton") for _ in "12"), strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    """Fakes allocate as the launchers do, also for strided inputs."""
    case: Case = CASES[name]()
    tensors = [tensor.detach().requires_grad_() for tensor in case.view(*case.inputs)]
    extra = {"modulated_norm": (1e-6,), "qk_norm_rope": (None, None, 1e-6)}.get(name, ())
    torch.library.opcheck(getattr(torch.ops.vpo_kernels, name), (*tensors, *extra))


@pytest.mark.parametrize("name", CASES)
def test_fullgraph_compile(name: str) -> None:
    case: Case = CASES[name]()
    leaves = [leaf.detach().requires_grad_() for leaf in case.inputs]
    compiled = torch.compile(
        lambda *leaves: case.operation(*case.view(*leaves), backend="triton").square().sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(
        case.operation(*case.view(*leaves), backend="triton").square().sum(), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_mixed_dtypes_promote_as_in_eager() -> None:
    """Under autocast the residual stream and the modulation are float32, what comes from a layer bfloat16."""
    x, modulation = torch.randn(2, 3, 4, 40), torch.randn(2, 1, 1, 40, requires_grad=True)
    y = torch.randn(2, 3, 4, 40).bfloat16().requires_grad_()
    out = gated_residual(x, modulation, y, backend="triton")
    torch.testing.assert_close(out, gated_residual(x, modulation, y, backend="reference"))
    out.sum().backward()
    assert y.grad.dtype == torch.bfloat16
    normed = modulated_norm(y, modulation, modulation, backend="triton")
    assert normed.dtype == torch.float32


def test_float64_goes_to_the_formula() -> None:
    case = modulated((2, 3, 7, 72), (2, 1, 1, 72), torch.float64, False)
    ours, plain = results(case, backend="triton"), results(case, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
