"""The native backend compared with the formula in float64, for all dtypes, sizes, strides, masks, thread counts and
instruction sets."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vpo_kernels.paired_dpo import reference
from vpo_kernels.paired_dpo.contract import Forward, GradientInputs, Mask, Options, PairTensors, TargetNoise

native: Any = pytest.importorskip("vpo_kernels.paired_dpo.native", exc_type=ImportError)
extension_loader = importlib.import_module("vpo_kernels.native")

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]
SIZES = [(), (1,), (7,), (1023,), (1025,), (4, 20, 27, 30), (16384,), (5, 3, 1, 7), (3, 2, 9, 13, 11)]
VIEWS = ["contiguous", "sliced", "permuted", "strided", "expanded", "expanded inside"]
PLAIN = Options(500.0, 1.0, "mean", 0.0, None)
ROUNDING = 2.0**-24  # of one float32 operation, relative
# Two operations per factor, one product, and up to 32 additions to a lane before it is widened.
ROUNDINGS = 2 + 2 + 1 + 32


@pytest.fixture(params=native.extension.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def view(tensor: Tensor, how: str) -> Tensor:
    """Return the same shape with other strides, and the same values, unless it is expanded."""
    dims = tensor.ndim
    if how == "sliced" and dims > 1:
        return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, : tensor.shape[1]]
    if how == "permuted":
        order = (0, *reversed(range(1, dims)))
        return tensor.permute(order).contiguous().permute(order)
    if how == "strided":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    if how == "expanded":
        return tensor[:1].expand(tensor.shape)
    if how == "expanded inside" and dims > 2:
        return tensor[:, :1, ..., :1].expand(tensor.shape)
    return tensor


def some_mask(pick: random.Random, shape: tuple[int, ...]) -> Mask | None:
    if pick.random() < 0.5:
        return None
    small = tuple(size if pick.random() < 0.5 else 1 for size in shape)
    mask = torch.rand(small, generator=torch.Generator().manual_seed(pick.randrange(99))) < 0.6
    mask[(slice(None), *[0] * (len(shape) - 1))] = True
    counted = mask.expand(shape)
    return Mask(counted, counted.reshape(shape[0], -1).sum(1))


@functools.lru_cache(maxsize=2)  # for the instruction sets, which follow each other
def case(seed: int) -> tuple[PairTensors, TargetNoise | None, Mask | None, Options, tuple[int, ...]]:
    pick = random.Random(seed)
    pairs = pick.choice([1, 2, 4])
    shape = (pairs, *SIZES[seed % len(SIZES)])
    dtypes = DTYPES[: 4 if pick.random() < 0.2 else 3]
    uniform = pick.choice(dtypes) if pick.random() < 0.4 else None
    tensors = [
        view(normal(shape, uniform or pick.choice(dtypes), 10 * seed + i), pick.choice(VIEWS))
        for i in range(7)
    ]
    noise = None
    if pick.random() < 0.4:
        noise = TargetNoise(
            tensors[6], pick.choice([-0.3, normal((pairs,), torch.bfloat16)]), normal((pairs,))
        )
    options = Options(
        pick.choice([2.5, torch.rand(pairs) + 0.5]),
        pick.choice([1.0, torch.rand(pairs)]),
        pick.choice(["mean", "sum"]),
        pick.choice([0.0, 0.0, 0.7]),
        pick.choice([None, None, 0.3]),
    )
    return PairTensors(*tensors[:6]), noise, some_mask(pick, shape), options, shape


def targets_formed(tensors: PairTensors, noise: TargetNoise | None, dtype: torch.dtype) -> PairTensors:
    """Return the tensors with the targets that the noise makes, rounded as the arithmetic of ``dtype`` rounds them."""
    if noise is None:
        return tensors
    pairs = noise.noise.shape[0]
    a, b = (
        torch.as_tensor(scale).double().expand(pairs).to(dtype).reshape(-1, *[1] * (noise.noise.ndim - 1))
        for scale in noise[1:]
    )
    formed = [a * tensor.to(dtype) + b * noise.noise.to(dtype) for tensor in tensors[4:]]
    return PairTensors(*tensors[:4], *formed)


def allowed(tensors: PairTensors, mask: Mask | None, options: Options, member: int) -> Tensor:
    """Return the error that float32 arithmetic may make in an error change, [P]: ROUNDINGS of the terms' sizes."""
    policy, ref, target = (t.double() for t in (tensors[member], tensors[2 + member], tensors[4 + member]))
    sizes = (policy.abs() + ref.abs()) * (policy.abs() + ref.abs() + 2 * target.abs())
    if mask is not None:
        sizes = sizes.masked_fill(~mask.counted, 0)
    counts = mask.counts if mask is not None else policy[0].numel()
    total = sizes.reshape(sizes.shape[0], -1).sum(1)
    return ROUNDINGS * ROUNDING * (total / counts if options.reduction == "mean" else total)


def same(ours: Forward, theirs: Forward) -> bool:
    pairs = zip(
        (*ours.out, ours.coefficient, ours.slope),
        (*theirs.out, theirs.coefficient, theirs.slope),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def test_equals_the_formula_in_float64(instruction_set: str) -> None:
    for seed in range(54):
        tensors, noise, mask, options, shape = case(seed)
        found = native.forward(tensors, noise, mask, options)
        dtype = found.out.loss.dtype
        exact = PairTensors(*(tensor.double() for tensor in targets_formed(tensors, noise, dtype)))
        wanted = reference.forward(exact, None, mask, options)
        assert found.coefficient.dtype == torch.float64
        assert found.coefficient.shape == (2, shape[0])
        for member, (ours, theirs) in enumerate(zip(found.out[2:4], wanted.out[2:4], strict=True)):
            assert ours.dtype == dtype
            assert ((ours.double() - theirs).abs() <= allowed(exact, mask, options, member)).all()
        off = allowed(exact, mask, options, 0) + allowed(exact, mask, options, 1)
        beta = torch.as_tensor(options.beta).double()
        margin_off = (found.out.margin.double() - wanted.out.margin).abs()
        assert (margin_off <= beta / 2 * off + ROUNDING * wanted.out.margin.abs()).all()
        torch.testing.assert_close(found.out.loss.double(), wanted.out.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.coefficient, wanted.coefficient, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.slope, wanted.slope, rtol=1e-4, atol=1e-9)
        for ours, theirs in zip(found.out[4:], wanted.out[4:], strict=True):
            assert ours.dtype == dtype
            assert ((ours.double() - theirs).abs() <= (ROUNDINGS + 1) * ROUNDING * theirs).all()
        dense = PairTensors(*(tensor.contiguous() for tensor in tensors))
        assert same(found, native.forward(dense, noise, mask, options))


def test_gradient_equals_the_reference_bitwise(instruction_set: str) -> None:
    """The gradient is elementwise, so that there is one right answer."""
    for seed in range(54):
        tensors, noise, mask, _, shape = case(seed)
        counted = mask and mask.counted
        coefficient, grad_loss = normal((2, shape[0])), torch.tensor(1.7)
        for wanted in ((True, True), (False, True), (True, False)):
            inputs = GradientInputs(
                tensors.policy, tensors.target, noise, counted, coefficient, grad_loss, wanted
            )
            found, expected = native.gradient(inputs), reference.gradient(inputs)
            for ours, theirs, policy in zip(found, expected, tensors[:2], strict=True):
                if theirs is None:
                    assert ours is None
                    continue
                assert (ours.dtype, ours.stride()) == (policy.dtype, torch.empty_like(policy).stride())
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtypes", [(d, t) for d in DTYPES[:3] for t in DTYPES[:3]], ids=str)
def test_bits_depend_on_values_and_size_alone(
    dtypes: tuple[torch.dtype, torch.dtype], threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not depend on threads, processor or dtypes: a value that a small dtype holds, a large one holds too."""
    shape = (3, 2, 64801)
    tensors = PairTensors(*(normal(shape, dtypes[i > 3], i) for i in range(6)))
    upcast = PairTensors(*(tensor.float() for tensor in tensors))
    options = PLAIN._replace(winner_anchor=0.5, loser_scaling=0.1)
    torch.set_num_threads(1)
    first = native.forward(tensors, None, None, options)
    inputs = GradientInputs(tensors.policy, tensors.target, None, None, first.coefficient, torch.ones(()))
    steps = native.gradient(inputs)
    for name in native.extension.instruction_sets():
        monkeypatch.setattr(native, "INSTRUCTION_SET", name)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert same(first, native.forward(tensors, None, None, options))
            assert same(first, native.forward(upcast, None, None, options))
            again = native.gradient(inputs)
            assert all(torch.equal(a, b) for a, b in zip(steps, again, strict=True))


def difference(policy: Tensor, target: Tensor) -> Tensor:
    """Return policy - target in policy's dtype, which is the gradient for a coefficient of 1/2."""
    half = torch.full((2, policy.shape[0]), 0.5, dtype=torch.float64)
    pair = (policy, policy), (target, target)
    winner, loser = native.gradient(GradientInputs(*pair, None, None, half, torch.ones(()), (True, False)))
    assert loser is None
    return winner


def identical(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", ["contiguous", "strided"])
def test_every_half_widens_exactly(dtype: torch.dtype, how: str, instruction_set: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    zeros = torch.zeros_like(every)
    identical(difference(view(every, how), zeros), every)
    identical(difference(view(every.float(), how), zeros), every.float())
    identical(difference(zeros.float(), view(every, how)), -every.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", ["contiguous", "strided"])
def test_stores_round_to_nearest_even(dtype: torch.dtype, how: str, instruction_set: str) -> None:
    """The values are all halves, the midpoints between neighbours, and the floats next to those; also infinity."""
    every = torch.arange(0, 2**15, dtype=torch.int16).view(dtype).double()
    every = torch.cat([every[every.isfinite()], 2 * every[every.isfinite()].max()[None]])
    middle = ((every[1:] + every[:-1]) / 2).float()
    up, down = (torch.nextafter(middle, torch.tensor(side)) for side in (torch.inf, 0.0))
    positive = torch.cat([every.float(), middle, up, down, torch.tensor([torch.inf, torch.nan, 3e38])])
    values = torch.cat([positive, -positive])[None]
    zeros = view(torch.zeros_like(values, dtype=dtype), how)
    identical(difference(zeros, -values), values.to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(6))
def test_not_finite_values_spread_as_in_the_reference(where: int, value: float, instruction_set: str) -> None:
    tensors = PairTensors(*(normal((3, 40), torch.float32, i) for i in range(6)))
    tensors[where][1, 17] = value
    for options in (PLAIN, PLAIN._replace(winner_anchor=0.5, loser_scaling=0.1)):
        found = native.forward(tensors, None, None, options)
        wanted = reference.forward(tensors, None, None, options)
        for ours, theirs in zip(
            (*found.out, found.coefficient), (*wanted.out, wanted.coefficient), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        inputs = GradientInputs(
            tensors.policy, tensors.target, None, None, wanted.coefficient, torch.ones(())
        )
        for ours, theirs in zip(native.gradient(inputs), reference.gradient(inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_elements_do_not_count_whatever_they_are(dtype: torch.dtype, instruction_set: str) -> None:
    counted = (torch.arange(2100) % 5 != 2).expand(2, 2100)
    mask = Mask(counted, counted.sum(1))
    clean = [normal((2, 2100), dtype, i).masked_fill(~counted, 0) for i in range(7)]
    options = PLAIN._replace(winner_anchor=0.5, loser_scaling=0.1)
    results = []
    for value in (0.0, torch.nan, torch.inf):
        *six, noise = [tensor.masked_fill(~counted, value) for tensor in clean]
        tensors, formed = PairTensors(*six), TargetNoise(noise, 0.7, -1.0)
        coefficient = torch.full((2, 2), torch.inf, dtype=torch.float64)
        found = native.forward(tensors, formed, mask, options)
        steps = native.gradient(
            GradientInputs(tensors.policy, tensors.target, formed, counted, coefficient, torch.ones(()))
        )
        assert all((step[~counted] == 0).all() for step in steps)
        results.append(found)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


class _Allocated(TorchDispatchMode):
    """Records the sizes in bytes of all tensors that torch makes while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.sizes.append(out.nbytes)
        return out


def test_allocates_the_gradients_and_a_few_numbers_per_pair() -> None:
    shape = (2, 8, 50, 50)
    wide = [normal(shape, torch.bfloat16, i)[:, :4].permute(0, 2, 3, 1) for i in range(7)]
    tensors, noise = PairTensors(*wide[:6]), TargetNoise(wide[6], 0.5, -1.0)
    mask = torch.ones(2, 50, 1, 1, dtype=torch.bool).expand(2, 50, 50, 4)
    with _Allocated() as forward:
        found = native.forward(tensors, noise, Mask(mask, torch.tensor([10**4] * 2)), PLAIN)
    assert max(forward.sizes) <= found.per_pair.nbytes
    with _Allocated() as backward:
        native.gradient(
            GradientInputs(tensors.policy, tensors.target, noise, mask, found.coefficient, torch.ones(()))
        )
    assert [size for size in backward.sizes if size > 8] == [wide[0].numel() * 2] * 2


def test_a_fork_computes_as_its_parent_does(threads: None) -> None:
    tensors = PairTensors(*(normal((2, 200_000), torch.bfloat16, i) for i in range(6)))
    torch.set_num_threads(2)
    wanted = native.forward(tensors, None, None, PLAIN)
    child = os.fork()
    if child == 0:
        os._exit(0 if same(wanted, native.forward(tensors, None, None, PLAIN)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_from_several_threads_do_not_meet() -> None:
    tensors = [
        PairTensors(*(normal((1, 150_000), torch.float16, 6 * k + i) for i in range(6))) for k in range(4)
    ]
    alone = [native.forward(each, None, None, PLAIN) for each in tensors]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: native.forward(each, None, None, PLAIN), tensors * 3))
    assert all(same(a, b) for a, b in zip(alone * 3, together, strict=True))


def test_what_the_extension_refuses_becomes_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = PairTensors(*(normal((2, 3), torch.float64, i) for i in range(6)))
    monkeypatch.setattr(native, "INSTRUCTION_SET", "mmx")
    with pytest.raises(ValueError, match="this processor has no instruction set mmx"):
        native.forward(tensors, None, None, PLAIN)
    monkeypatch.undo()
    monkeypatch.setattr(native, "arithmetic_dtype", lambda *_: torch.float32)
    with pytest.raises(ValueError, match="float64 needs wide"):
        native.forward(tensors, None, None, PLAIN)


def test_without_the_extension_the_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vpo_kernels._native", None)
    spec = importlib.util.spec_from_file_location("native_once_more", extension_loader.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ImportError,
        match=r"^this installation is without it: .* without a C\+\+ compiler or Python's headers$",
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
