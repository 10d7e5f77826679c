"""The paired DPO loss: its invariants and gradients. test_paired_dpo_goldens.py compares it with the public code."""

import pytest
import torch
from pair_tensors import LARGE, LN2, Loss, close, large_case, random_tensors, stored
from torch import Tensor
from vpo_kernels.paired_dpo.contract import PairTensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4, 3, 5, 9), (4,)])
def test_policy_equal_to_reference_gives_margin_zero_and_ln2(
    dpo_loss: Loss, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    t = random_tensors(*shape, dtype=dtype)
    out = dpo_loss(t[0], t[1], t[0].detach(), t[1].detach(), t[4], t[5], beta=5000.0)
    assert torch.equal(out.margin, torch.zeros(shape[0], dtype=out.margin.dtype))
    assert out.loss.item() == torch.tensor(LN2, dtype=out.loss.dtype).item()
    out.loss.backward()
    assert t.policy_winner.grad.abs().max() > 0  # at ln 2 there is something to learn


def test_swapping_negates_the_margin_bitwise(dpo_loss: Loss) -> None:
    w, x, rw, rx, tw, tx = random_tensors(5, 3, 8)
    there = dpo_loss(w, x, rw, rx, tw, tx, beta=3000.0)
    back = dpo_loss(x, w, rx, rw, tx, tw, beta=3000.0)
    assert torch.equal(there.margin, -back.margin)
    assert torch.equal(there.winner_error_change, back.loser_error_change)
    assert there.margin.abs().min() > 0


def test_the_names_of_version_0_1_give_the_same_tensors(dpo_loss: Loss) -> None:
    out = dpo_loss(*random_tensors(2, 5))
    assert out.winner_gap is out.winner_error_change
    assert out.loser_gap is out.loser_error_change
    assert out._fields[:4] == ("loss", "margin", "winner_error_change", "loser_error_change")


def test_definitions_of_margin_and_loss(dpo_loss: Loss) -> None:
    out = dpo_loss(*random_tensors(4, 50, dtype=torch.float64), beta=700.0)
    torch.testing.assert_close(out.margin, -350.0 * (out.winner_error_change - out.loser_error_change))
    torch.testing.assert_close(out.loss, torch.log1p(torch.exp(-out.margin)).mean())


def test_float32_beats_the_plain_formula(dpo_loss: Loss) -> None:
    """The fixture's plain float32 errs by 8e-4 in the margin here; ours must stay a hundred times closer."""
    case = LARGE["cases"][1]
    golden = case["betas"][2]
    out = dpo_loss(*large_case(case)[0], beta=golden["beta"])
    exact = torch.tensor(golden["inside_term"], dtype=torch.float64)
    plain = (torch.tensor(golden["float32_public_formula"]["inside_term"], dtype=torch.float64) - exact).abs()
    assert (out.margin.double() - exact).abs().max() < plain.min() / 100


def test_all_bf16_inputs_keep_the_signal(dpo_loss: Loss) -> None:
    """Eager bf16 arithmetic reads a margin of exactly 0 on these inputs."""
    exact = dpo_loss(*(t.detach().bfloat16().double() for t in stored("eps4d")), beta=500.0)
    out = dpo_loss(*stored("eps4d", torch.bfloat16), beta=500.0)
    m, x, r, s, t, u = (half.bfloat16() for half in stored("eps4d"))
    naive = [(((a - c) ** 2).mean((1, 2, 3))) for a, c in ((m, t), (r, t), (x, u), (s, u))]
    assert torch.equal((naive[0] - naive[1]) - (naive[2] - naive[3]), torch.zeros(2, dtype=torch.bfloat16))
    close(out.margin, exact.margin, 1e-6)
    assert out.margin.abs().min() > 0.01


def test_margins_of_1e4_are_finite(dpo_loss: Loss) -> None:
    for sign in (1.0, -1.0):
        w = torch.tensor([[2.0]]).requires_grad_()
        x = torch.tensor([[2.0 + sign * 0.5]]).requires_grad_()
        zero = torch.zeros(1, 1)
        beta = 2e4 / abs((2.0 + sign * 0.5) ** 2 - 4.0)
        out = dpo_loss(w, x, zero, zero, zero, zero, beta=beta)
        out.loss.backward()
        assert out.margin.item() == pytest.approx(sign * 1e4)
        assert out.loss.item() == pytest.approx(0.0 if sign > 0 else 1e4)
        assert w.grad.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [4, 8])
def test_batch_equals_singles_bitwise(dpo_loss: Loss, dtype: torch.dtype, count: int) -> None:
    batch = random_tensors(count, 4, 3, 17, 11, dtype=dtype)
    mask = torch.rand(count, 1, 3, 1, 1, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[:, :, 0] = True
    out = dpo_loss(*batch, beta=2000.0, mask=mask)
    (out.loss * count).backward()  # a power of two: the mean over pairs is undone exactly
    for pair in range(count):
        slices = [tensor.detach()[pair : pair + 1].clone() for tensor in batch]
        single = PairTensors(*(one.requires_grad_(i < 2) for i, one in enumerate(slices)))
        alone = dpo_loss(*single, beta=2000.0, mask=mask[pair : pair + 1])
        alone.loss.backward()
        assert torch.equal(alone.margin[0], out.margin[pair])
        assert torch.equal(alone.winner_error_change[0], out.winner_error_change[pair])
        assert torch.equal(alone.loser_error_change[0], out.loser_error_change[pair])
        assert torch.equal(single.policy_winner.grad[0], batch.policy_winner.grad[pair])
        assert torch.equal(single.policy_loser.grad[0], batch.policy_loser.grad[pair])


def test_bitwise_rerun(dpo_loss: Loss) -> None:
    runs = []
    for _ in range(2):
        tensors = random_tensors(3, 4, 5, 33, 7)
        out = dpo_loss(*tensors, beta=900.0)
        out.loss.backward()
        runs.append([*(o.detach() for o in out), tensors.policy_winner.grad, tensors.policy_loser.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", ["plain", "weighted", "masked"])
def test_gradcheck(dpo_loss: Loss, reduction: str, options: str) -> None:
    tensors = random_tensors(3, 2, 5, dtype=torch.float64, drift=0.5)
    mask = torch.tensor([True, False, True, True, False]) if options == "masked" else None
    weight = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64) if options == "weighted" else None

    def loss(winner: Tensor, loser: Tensor) -> Tensor:
        return dpo_loss(
            winner, loser, *tensors[2:], beta=3.0, reduction=reduction, mask=mask, pair_weight=weight
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors[:2]))


def test_only_the_policy_gets_gradients(dpo_loss: Loss) -> None:
    tensors = PairTensors(*(t.detach().requires_grad_() for t in random_tensors(2, 6)))
    weight = torch.ones(2, requires_grad=True)
    out = dpo_loss(*tensors, pair_weight=weight)
    assert out.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in out[1:])
    out.loss.backward()
    assert tensors.policy_winner.grad is not None
    assert tensors.policy_loser.grad is not None
    assert all(t.grad is None for t in (*tensors[2:], weight))
    frozen = dpo_loss(tensors[0].detach(), tensors[1].detach(), *tensors[2:], pair_weight=weight)
    assert not frozen.loss.requires_grad


def test_one_side_at_a_time_equals_both(dpo_loss: Loss) -> None:
    """A trainer that saves memory takes the winner's graph, then the loser's, and gets the same gradient."""
    both = random_tensors(3, 40)
    dpo_loss(*both).loss.backward()
    for side in (0, 1):
        alone = [tensor.detach().clone().requires_grad_(i == side) for i, tensor in enumerate(both)]
        dpo_loss(*alone).loss.backward()
        assert torch.equal(alone[side].grad, both[side].grad)


def test_upstream_gradient_scales_and_accumulates(dpo_loss: Loss) -> None:
    once, thrice = random_tensors(2, 30), random_tensors(2, 30)
    dpo_loss(*once).loss.backward()
    (dpo_loss(*thrice).loss * 4).backward()
    assert torch.equal(thrice.policy_winner.grad, once.policy_winner.grad * 4)


def test_saves_inputs_and_two_numbers_per_pair_only(dpo_loss: Loss) -> None:
    tensors = random_tensors(2, 4, 8, 8)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dpo_loss(*tensors)
    inputs = {tensor.data_ptr() for tensor in (tensors[0], tensors[1], tensors[4], tensors[5])}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert {tensor.data_ptr() for tensor in saved} >= inputs
    assert sum(tensor.numel() for tensor in extra) == 4


def test_second_derivative_raises(dpo_loss: Loss) -> None:
    tensors = random_tensors(2, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad(dpo_loss(*tensors).loss, tensors.policy_winner, create_graph=True)
    with pytest.raises(RuntimeError, match=r"paired_dpo_loss has no second derivative; .*create_graph=True"):
        grad.sum().backward()


def test_create_graph_alone_is_harmless(dpo_loss: Loss) -> None:
    plain, graph = random_tensors(2, 3), random_tensors(2, 3)
    dpo_loss(*plain).loss.backward()
    (grad,) = torch.autograd.grad(dpo_loss(*graph).loss, graph.policy_loser, create_graph=True)
    assert torch.equal(grad, plain.policy_loser.grad)


# --- views, masks, weights -------------------------------------------------------------------------------


def test_strided_views_equal_contiguous_bitwise(dpo_loss: Loss) -> None:
    """STDiT3 keeps half of its output channels, chunk(2, dim=1)[0]; other models give permuted views."""
    dense = random_tensors(2, 4, 3, 6, 5)
    expected = dpo_loss(*dense, beta=800.0)
    expected.loss.backward()
    wide = torch.cat([dense.policy_winner.detach(), torch.full((2, 4, 3, 6, 5), torch.nan)], dim=1)
    wide.requires_grad_()
    last = dense.policy_loser.detach().permute(0, 2, 3, 4, 1).contiguous().requires_grad_()
    out = dpo_loss(
        wide.chunk(2, dim=1)[0],
        last.permute(0, 4, 1, 2, 3),
        dense[2].transpose(2, 4).contiguous().transpose(2, 4),
        *dense[3:],
        beta=800.0,
    )
    out.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert torch.equal(wide.grad[:, :4], dense.policy_winner.grad)
    assert torch.equal(wide.grad[:, 4:], torch.zeros(2, 4, 3, 6, 5))
    assert torch.equal(last.grad.permute(0, 4, 1, 2, 3), dense.policy_loser.grad)


def test_both_halves_of_one_prediction(dpo_loss: Loss) -> None:
    dense = random_tensors(3, 4, 5)
    dpo_loss(*dense).loss.backward()
    joint = torch.cat([dense[0].detach(), dense[1].detach()]).requires_grad_()
    dpo_loss(*joint.chunk(2), *dense[2:]).loss.backward()
    assert torch.equal(joint.grad, torch.cat([dense[0].grad, dense[1].grad]))


def test_mixed_dtypes(dpo_loss: Loss) -> None:
    exact = random_tensors(2, 300)
    mixed = PairTensors(
        exact[0].detach().bfloat16().requires_grad_(), exact[1].detach().half().requires_grad_(), *exact[2:]
    )
    out = dpo_loss(*mixed)
    upcast = dpo_loss(mixed[0].float(), mixed[1].float(), *mixed[2:])
    assert all(torch.equal(a, b) for a, b in zip(out, upcast, strict=True))
    out.loss.backward()
    assert mixed[0].grad.dtype == torch.bfloat16
    assert mixed[1].grad.dtype == torch.float16
    assert dpo_loss(*mixed[:5], mixed[5].double()).loss.dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 1, 6, 1), (1, 1, 6, 1), (6, 1), (3, 4, 6, 5), (5,), ()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mask_equals_dropping_the_elements(dpo_loss: Loss, shape: tuple[int, ...], reduction: str) -> None:
    tensors = random_tensors(3, 4, 6, 5, dtype=torch.float64)
    mask = (
        torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4 if shape else torch.tensor(True)
    )
    full = mask.expand(3, 4, 6, 5)
    out = dpo_loss(*tensors, beta=50.0, reduction=reduction, mask=mask)
    (out.loss * 3).backward()
    for pair in range(3):
        kept = [
            t.detach()[pair][full[pair]][None].clone().requires_grad_(i < 2) for i, t in enumerate(tensors)
        ]
        alone = dpo_loss(*kept, beta=50.0, reduction=reduction)
        alone.loss.backward()
        torch.testing.assert_close(alone.margin[0], out.margin[pair])
        torch.testing.assert_close(kept[0].grad[0], tensors[0].grad[pair][full[pair]])
        assert (tensors[0].grad[pair][~full[pair]] == 0).all()
        assert (tensors[1].grad[pair][~full[pair]] == 0).all()


def test_masked_elements_may_be_nan(dpo_loss: Loss) -> None:
    clean, dirty = random_tensors(2, 3, 8), random_tensors(2, 3, 8)
    mask = torch.arange(8) < 5
    with torch.no_grad():
        for tensor in dirty:
            tensor[..., 5:] = torch.nan
    outs = [dpo_loss(*tensors, mask=mask) for tensors in (clean, dirty)]
    for out in outs:
        out.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert torch.equal(clean.policy_loser.grad, dirty.policy_loser.grad)


def test_nan_that_counts_reaches_the_loss(dpo_loss: Loss) -> None:
    tensors = random_tensors(2, 3)
    with torch.no_grad():
        tensors.policy_winner[1, 2] = torch.nan
    out = dpo_loss(*tensors)
    assert out.loss.isnan()
    assert out.margin.isnan().tolist() == [False, True]


def test_pair_weight_multiplies_outside_the_sigmoid(dpo_loss: Loss) -> None:
    tensors = random_tensors(4, 20, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 2.5, 0.25], dtype=torch.float64)
    out = dpo_loss(*tensors, pair_weight=weight)
    plain = dpo_loss(*tensors)
    assert torch.equal(out.margin, plain.margin)
    torch.testing.assert_close(out.loss, (weight * torch.log1p(torch.exp(-plain.margin))).mean())
    out.loss.backward()
    assert (tensors.policy_winner.grad[1] == 0).all()
    assert (tensors.policy_winner.grad[0] != 0).all()
