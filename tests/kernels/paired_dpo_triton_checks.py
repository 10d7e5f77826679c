"""Checks of the paired loss's Triton kernels beyond the common tests, on a GPU or interpreted.

pytest does not collect this file by itself: test_interpreted.py runs it interpreted, test_paired_dpo_gpu.py on a GPU.
"""

import os
from collections.abc import Callable

import pytest
import torch
from pair_tensors import random_tensors
from torch import Tensor
from vpo_kernels import paired_dpo_loss
from vpo_kernels.paired_dpo import reference, triton, triton_kernels
from vpo_kernels.paired_dpo.contract import Forward, GradientInputs, Mask, Options, PairTensors, TargetNoise
from vpo_kernels.registration import arithmetic_dtype

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
PLAIN = Options(500.0, 1.0, "mean", 0.0, None)
EVERYTHING = Options(500.0, 1.0, "mean", 0.3, 0.4)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def tensors_of(*shape: int, dtypes: tuple[torch.dtype, ...] = (FP32,), seed: int = 0) -> PairTensors:
    """Return random tensors without gradients, whose policy, reference and target have these dtypes.

    Where there are fewer dtypes than three, the first serves for the rest.
    """
    of = [dtypes[i // 2] if i // 2 < len(dtypes) else dtypes[0] for i in range(6)]
    tensors = random_tensors(*shape, dtype=FP64, seed=seed)
    return PairTensors(*(t.detach().to(DEVICE, dtype) for t, dtype in zip(tensors, of, strict=True)))


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)


def some(*shape: int) -> Tensor:
    """Return a mask that leaves each pair some elements."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    mask.view(shape[0], -1)[:, 0] = True
    return mask.to(DEVICE)


def mask_of(counted: Tensor, shape: torch.Size) -> Mask:
    counted = counted.expand(shape)
    return Mask(counted, counted.reshape(shape[0], -1).sum(1))


def results(done: Forward) -> list[Tensor]:
    return [*done.out, done.coefficient, done.slope]


def both_gradients(
    tensors: PairTensors, noise: TargetNoise | None, mask: Tensor | None, coefficient: Tensor
) -> list[tuple[Tensor | None, Tensor | None]]:
    grad_loss = torch.tensor(1.5, device=DEVICE)
    inputs = GradientInputs(tensors.policy, tensors.target, noise, mask, coefficient, grad_loss)
    return [backend.gradient(inputs) for backend in (triton, reference)]


def assert_as_reference(
    tensors: PairTensors, noise: TargetNoise | None = None, mask: Mask | None = None, options: Options = PLAIN
) -> Forward:
    """Compare sums with plain torch in float64, up to the error of a float32 tree, and gradients to the bit."""
    done = triton.forward(tensors, noise, mask, options)
    exact = reference.forward(PairTensors(*(t.double() for t in tensors)), noise, mask, options)
    wide = arithmetic_dtype(*tensors, noise and noise.noise) == FP64
    assert done.out.loss.dtype == (FP64 if wide else FP32)
    # Each term errs by 2^-22 of |m - r| * (|m| + |r| + 2 |t|), which exceeds the error change about a hundredfold here.
    bound = 1e-12 if wide else 3e-5
    for mine, theirs in zip(results(done), results(exact), strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).abs().max() <= bound * theirs.abs().max().clamp(min=1e-2)
    mine, theirs = both_gradients(tensors, noise, mask and mask.counted, done.coefficient)
    for a, b in zip(mine, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    return done


# --- sizes, dtypes, options ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 1023, 1025, 4096, 64800])
@pytest.mark.parametrize("dtypes", [(BF16,), (BF16, BF16, FP32), (FP32,)])
def test_sizes(n: int, dtypes: tuple[torch.dtype, ...]) -> None:
    assert_as_reference(tensors_of(2 if n < 5000 else 1, n, dtypes=dtypes))


def test_a_720p_sample() -> None:
    assert_as_reference(tensors_of(1, 4, 20, 90, 160, dtypes=(BF16, BF16, FP32)))


@pytest.mark.parametrize(
    "dtypes", [(FP16, BF16, FP32), (FP32, FP16, BF16), (FP32, FP32, FP64), (BF16, FP64, FP16)]
)
def test_dtypes_in_any_mixture(dtypes: tuple[torch.dtype, ...]) -> None:
    tensors = tensors_of(3, 5, 77, dtypes=dtypes)
    assert_as_reference(tensors)
    mixed = PairTensors(tensors[0].half(), tensors[1].bfloat16(), *tensors[2:])
    assert_as_reference(mixed, TargetNoise(normal(3, 5, 77, dtype=FP16), 1.0, -1.0), None, EVERYTHING)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@pytest.mark.parametrize("mask", [(1, 1, 6, 1), (3, 1, 6, 1), (3, 1, 1, 35), (3, 4, 6, 35)])
def test_masks_of_any_stride(mask: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = tensors_of(3, 4, 6, 35, dtypes=(dtype,))
    counted = some(*mask)
    noise = TargetNoise(normal(3, 4, 6, 35, dtype=dtype), 0.5, torch.tensor([1.0, -1.0, 0.25], device=DEVICE))
    clean = assert_as_reference(tensors, noise, mask_of(counted, tensors[0].shape), EVERYTHING)
    dirty = PairTensors(*(t.masked_fill(~counted, torch.nan) for t in tensors))
    noise = noise._replace(noise=noise.noise.masked_fill(~counted, torch.inf))
    done = triton.forward(dirty, noise, mask_of(counted, tensors[0].shape), EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(results(clean), results(done), strict=True))
    (mine, _), (theirs, _) = both_gradients(dirty, noise, counted.expand(tensors[0].shape), done.coefficient)
    assert torch.equal(mine, theirs)
    assert mine.isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_numbers_per_pair_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    values = torch.tensor([[300.0, 0.5], [500.0, -1.0], [4096.0, 2.0]], device=DEVICE, dtype=dtype)
    beta, scale = values.unbind(1)
    options = Options(beta, scale.expand(3), "sum", 0.01, 0.0)
    tensors = tensors_of(3, 40)
    by_tensor = triton.forward(tensors, TargetNoise(normal(3, 40), scale, beta / 4096), None, options)
    exact = reference.forward(tensors, TargetNoise(normal(3, 40), scale, beta / 4096), None, options)
    for mine, theirs in zip(results(by_tensor), results(exact), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    scalar = scale[:1].clone()
    one, other = (
        triton.forward(PairTensors(*(t[:1] for t in tensors)), None, None, Options(b, w, "mean", 0.0, None))
        for b, w in ((beta[:1], scalar), (float(beta[0]), float(scalar)))
    )
    assert all(torch.equal(a, b) for a, b in zip(results(one), results(other), strict=True))


def test_numbers_keep_their_float64_digits() -> None:
    tensors = tensors_of(2, 30, dtypes=(FP64,))
    noise = TargetNoise(normal(2, 30, dtype=FP64), 0.1, -1.0 / 3.0)
    options = Options(100.1, 1.0, "mean", 0.7, 0.1)
    mine, theirs = (backend.forward(tensors, noise, None, options) for backend in (triton, reference))
    for a, b in zip(results(mine), results(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("pairs", "n"), [(130, 3), (9, 4097)])
def test_many_pairs(pairs: int, n: int) -> None:
    """There are more pairs than ``finish`` takes at a time; the loss is their mean."""
    done = assert_as_reference(tensors_of(pairs, n, dtypes=(BF16,)))
    mean = torch.nn.functional.softplus(-done.out.margin.double()).mean()
    torch.testing.assert_close(done.out.loss.double(), mean, rtol=1e-6, atol=0)


# --- bits ------------------------------------------------------------------------------------------------


def tree(terms: Tensor) -> Tensor:
    """Sum float32 [P, n] to float64 [P]: neighbours are added within chunks of 4096, then the chunks in float64."""
    padded = torch.nn.functional.pad(terms, (0, -terms.shape[1] % 4096)).reshape(terms.shape[0], -1, 4096)
    while padded.shape[-1] > 1:
        padded = padded[..., ::2] + padded[..., 1::2]
    partials = padded[..., 0].double()
    columns = 16 if partials.shape[1] <= 16 else 256
    lanes = torch.nn.functional.pad(partials, (0, -partials.shape[1] % columns))
    lanes = lanes.reshape(terms.shape[0], -1, columns)
    total = torch.zeros_like(lanes[:, 0])
    for lane in lanes.unbind(1):
        total = total + lane
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return total[..., 0]


@pytest.mark.parametrize("n", [5, 4096, 9001, 70001])
def test_error_changes_are_the_documented_tree_to_the_bit(n: int) -> None:
    """Because bits depend on n alone, any GPU, and the interpreter, must give these."""
    t = tensors_of(2 if n < 9001 else 1, n, dtypes=(BF16, BF16, FP32))
    m, _, r, _, x, _ = (tensor.float() for tensor in t)
    expected = (tree((m - r) * (m + r - 2 * x)) / n).float()
    assert torch.equal(triton.forward(t, None, None, PLAIN).out.winner_error_change, expected)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(1, -1).contiguous().transpose(1, -1)


def channels_last(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def pairs_last(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def first_channels(t: Tensor) -> Tensor:
    return torch.cat([t, torch.full_like(t, torch.nan)], dim=1)[:, : t.shape[1]]


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


def odd_address(t: Tensor) -> Tensor:
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return room.view(t.shape).copy_(t)


def reversed_dims(t: Tensor) -> Tensor:
    return t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1])


VIEWS = [transposed, channels_last, pairs_last, first_channels, every_other, odd_address, reversed_dims]


@pytest.mark.parametrize("view", VIEWS)
def test_views_equal_contiguous_bitwise(view: Callable[[Tensor], Tensor]) -> None:
    dense = tensors_of(2, 4, 3, 6, 10, dtypes=(BF16, FP32, BF16))
    noise = TargetNoise(normal(2, 4, 3, 6, 10), 1.0, -1.0)
    counted = some(2, 4, 3, 6, 10)
    expected = triton.forward(dense, noise, mask_of(counted, dense[0].shape), EVERYTHING)
    mine, _ = both_gradients(dense, noise, counted, expected.coefficient)
    for which in ((0, 3), (4,), (1, 2, 5)):
        strided = PairTensors(*(view(t) if i in which else t for i, t in enumerate(dense)))
        strange = noise._replace(noise=view(noise.noise)) if 4 in which else noise
        mask = Mask(
            view(counted) if 4 in which and view is not first_channels else counted, counted.flatten(1).sum(1)
        )
        done = triton.forward(strided, strange, mask, EVERYTHING)
        assert all(torch.equal(a, b) for a, b in zip(results(done), results(expected), strict=True))
        grads, _ = both_gradients(strided, strange, mask.counted, expected.coefficient)
        for grad, same, policy in zip(grads, mine, strided[:2], strict=True):
            assert grad.stride() == torch.empty_like(policy).stride()
            assert torch.equal(grad, same)


def test_seven_dimensions_that_nothing_joins() -> None:
    dense = tensors_of(2, 2, 3, 2, 3, 2, 3)
    shuffled = [t.permute(0, 6, 2, 4, 1, 3, 5).contiguous().permute(0, 4, 2, 5, 3, 6, 1) for t in dense]
    assert shuffled[0].shape == dense[0].shape
    a, b = (triton.forward(PairTensors(*t), None, None, PLAIN) for t in (dense, shuffled))
    assert all(torch.equal(x, y) for x, y in zip(results(a), results(b), strict=True))


def test_samples_that_repeat_an_element() -> None:
    """Tensors that get no gradient may have stride 0, as expand makes it."""
    dense = tensors_of(2, 3, 40)
    wide = dense._replace(
        target_winner=dense[4][:, :1].expand(2, 3, 40), reference_loser=dense[3][:1].expand(2, 3, 40)
    )
    assert_as_reference(wide)


@pytest.mark.parametrize("n", [50, 70000])
def test_a_batch_equals_singles_and_itself_bitwise(n: int) -> None:
    batch = tensors_of(3 if n == 50 else 2, n, dtypes=(BF16, BF16, FP32))
    done, again = (triton.forward(batch, None, None, PLAIN) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(results(done), results(again), strict=True))
    for pair in range(batch[0].shape[0]):
        alone = triton.forward(PairTensors(*(t[pair : pair + 1] for t in batch)), None, None, PLAIN)
        for single, many in zip(alone.out[1:], done.out[1:], strict=True):
            assert torch.equal(single[0], many[pair])


# --- launches and gradients ------------------------------------------------------------------------------


class Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel: object, log: list[str], name: str) -> None:
        self.kernel, self.log, self.name = kernel, log, name

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.log.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("extras", [False, True])
def test_two_launches_forward_and_one_backward(extras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    for name in ("partial_sums", "finish", "gradients"):
        monkeypatch.setattr(triton_kernels, name, Counting(getattr(triton_kernels, name), log, name))
    tensors = PairTensors(
        *(t.requires_grad_(i < 2) for i, t in enumerate(tensors_of(3, 5000, dtypes=(BF16, BF16, FP32))))
    )
    options = (
        {"target_noise": normal(3, 5000), "target_scales": (1.0, -1.0), "winner_anchor": 0.1}
        if extras
        else {}
    )
    out = paired_dpo_loss(*tensors, backend="triton", **options)
    assert log == ["partial_sums", "finish"]
    out.loss.backward()
    assert log == ["partial_sums", "finish", "gradients"]


def test_only_the_wanted_gradients() -> None:
    t, coefficient = tensors_of(2, 30), torch.ones(2, 2, dtype=FP64, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    inputs = GradientInputs(t.policy, t.target, None, None, coefficient, one)
    both = triton.gradient(inputs)
    for wanted in ((True, False), (False, True)):
        grads = triton.gradient(inputs._replace(wanted=wanted))
        for grad, same, want in zip(grads, both, wanted, strict=True):
            assert torch.equal(grad, same) if want else grad is None


def test_gradient_against_differences() -> None:
    tensors = tensors_of(1, 3, dtypes=(FP64,))
    winner, loser = (t.clone().requires_grad_() for t in tensors[:2])
    assert torch.autograd.gradcheck(
        lambda w, x: paired_dpo_loss(w, x, *tensors[2:], beta=3.0, backend="triton", winner_anchor=0.2).loss,
        (winner, loser),
    )


def test_not_a_number_stays_one() -> None:
    tensors = tensors_of(3, 4000)
    tensors.policy_loser[1, 17] = torch.nan
    done = triton.forward(tensors, None, None, EVERYTHING)
    assert done.out.loss.isnan()
    assert done.out.margin.isnan().tolist() == [False, True, False]
    assert done.coefficient.isnan().tolist() == [[False, True, False]] * 2
