"""The results of the paired loss beside the loss: errors for the log, and margins that other losses are built of."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pair_tensors import Loss, random_tensors
from torch import Tensor
from torch.nn.functional import logsigmoid
from vpo_kernels import PairedDPOLoss, paired_dpo_loss, sequential_backward, single_pair_backward
from vpo_kernels.paired_dpo.contract import PairTensors

ERRORS = ("policy_winner_error", "policy_loser_error", "reference_winner_error", "reference_loser_error")
NOISE = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def squares(tensors: PairTensors, mask: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
    """Return the squared differences from the target in float64, [P, n] each, in the order of ``ERRORS``."""
    t = [tensor.double() for tensor in tensors]
    targets = t[4:] if noise is None else [0.5 * x0 - 1.5 * noise.double() for x0 in t[4:]]
    found = [(t[i] - targets[i % 2]).square() for i in range(4)]
    return [square if mask is None else square.masked_fill(~mask, 0) for square in found]


# --- the four errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", ["plain", "masked", "noise", "anchored", "scaled"])
def test_errors_are_those_of_the_plain_formula(
    dtype: torch.dtype, reduction: str, options: str, dpo_loss: Loss
) -> None:
    tensors, noise = random_tensors(3, 4, 10, dtype=dtype), NOISE.to(dtype)
    mask = torch.arange(10) < 7 if options == "masked" else None
    given = {
        "noise": {"target_noise": noise, "target_scales": (0.5, -1.5)},
        "anchored": {"winner_anchor": 0.1},
        "scaled": {"loser_scaling": 0.1},
    }.get(options, {})
    out = dpo_loss(*tensors, reduction=reduction, mask=mask, **given)
    wanted = squares(tensors, mask, noise if options == "noise" else None)
    counted = 4 * (7 if mask is not None else 10)
    for name, square in zip(ERRORS, wanted, strict=True):
        error = getattr(out, name)
        expected = square.flatten(1).sum(1) / (counted if reduction == "mean" else 1)
        assert error.dtype == out.margin.dtype
        assert not error.requires_grad
        torch.testing.assert_close(
            error.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0
        )


def test_errors_differ_by_the_error_changes(dpo_loss: Loss) -> None:
    out = dpo_loss(*random_tensors(3, 500, dtype=torch.float64))
    winner = out.policy_winner_error - out.reference_winner_error
    torch.testing.assert_close(winner, out.winner_error_change, rtol=1e-10, atol=1e-13)
    loser = out.policy_loser_error - out.reference_loser_error
    torch.testing.assert_close(loser, out.loser_error_change, rtol=1e-10, atol=1e-13)


def test_right_after_a_refresh_policy_and_reference_have_the_same_errors_to_the_bit(dpo_loss: Loss) -> None:
    t = random_tensors(2, 4, 999, dtype=torch.bfloat16)
    out = dpo_loss(t[0], t[1], t[0].detach(), t[1].detach(), t[4], t[5])
    assert torch.equal(out.policy_winner_error, out.reference_winner_error)
    assert torch.equal(out.policy_loser_error, out.reference_loser_error)


def test_a_tiny_error_is_not_lost_beside_a_large_one(dpo_loss: Loss) -> None:
    """Were the reference's error the policy's less the change, this one would be noise."""
    policy, reference = torch.full((1, 5000), 100.0), torch.full((1, 5000), 1e-3)
    zero = torch.zeros(1, 5000)
    out = dpo_loss(policy, policy, reference, reference, zero, zero)
    torch.testing.assert_close(out.reference_winner_error, torch.tensor([1e-6]), rtol=1e-5, atol=0)
    assert dpo_loss(policy, policy, zero, zero, zero, zero).reference_loser_error.item() == 0.0


# --- margins with a graph --------------------------------------------------------------------------------


def plain_margin(tensors: PairTensors, beta: Tensor | float, reduction: str, mask: Tensor | None) -> Tensor:
    """Return the margins of the formula in float64, with autograd's graph."""
    winner, loser, reference_winner, reference_loser = (
        s.flatten(1).sum(1)
        / (1 if reduction == "sum" else s[0].numel() if mask is None else int(mask.sum()) * 4)
        for s in squares(tensors, mask)
    )
    return -beta / 2 * ((winner - reference_winner) - (loser - reference_loser))


def hinge(margin: Tensor) -> Tensor:
    return torch.relu(1 - margin).mean()


def ipo(margin: Tensor) -> Tensor:
    return (margin - 0.5).square().mean()


def sigmoid(margin: Tensor) -> Tensor:
    return -logsigmoid(margin).mean()


@pytest.mark.parametrize("build", [hinge, ipo, sigmoid])
@pytest.mark.parametrize("options", ["mean", "sum", "masked", "beta per pair"])
def test_losses_built_of_margins_equal_autograds(
    build: Callable[[Tensor], Tensor], options: str, dpo_loss: Loss
) -> None:
    ours = random_tensors(3, 4, 10, dtype=torch.float64, drift=0.5)
    theirs = PairTensors(*(t.detach().clone().requires_grad_(i < 2) for i, t in enumerate(ours)))
    beta = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64) if options == "beta per pair" else 2.0
    reduction = "sum" if options == "sum" else "mean"
    mask = torch.arange(10) < 7 if options == "masked" else None
    out = dpo_loss(*ours, beta=beta, reduction=reduction, mask=mask, margin_graph=True)
    expected = plain_margin(theirs, beta, reduction, mask)
    torch.testing.assert_close(out.margin, expected)
    build(out.margin).backward()
    build(expected).backward()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert other.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_the_margin(reduction: str, dpo_loss: Loss) -> None:
    tensors = random_tensors(2, 2, 4, dtype=torch.float64, drift=0.5)
    beta = torch.tensor([1.5, 0.4], dtype=torch.float64)

    def margin(winner: Tensor, loser: Tensor) -> Tensor:
        return dpo_loss(winner, loser, *tensors[2:], beta=beta, reduction=reduction, margin_graph=True).margin

    assert torch.autograd.gradcheck(margin, tuple(tensors[:2]))


def test_gradients_of_loss_and_margin_add_up(dpo_loss: Loss) -> None:
    def gradients(build: Callable[[PairedDPOLoss], Tensor]) -> tuple[Tensor, ...]:
        tensors = random_tensors(3, 20, dtype=torch.float64)
        out = dpo_loss(*tensors, beta=30.0, winner_anchor=0.2, margin_graph=True)
        return torch.autograd.grad(build(out), tensors[:2])

    both = gradients(lambda out: 2 * out.loss + hinge(out.margin))
    parts = zip(gradients(lambda out: 2 * out.loss), gradients(lambda out: hinge(out.margin)), strict=True)
    for together, (one, other) in zip(both, parts, strict=True):
        torch.testing.assert_close(together, one + other)


def test_loser_scaling_reaches_the_margins_gradient(dpo_loss: Loss) -> None:
    """The loss is a function of the margin, so that both ways to its gradient must agree."""
    grads = []
    for by_margin in (False, True):
        t = random_tensors(2, 30, dtype=torch.float64, drift=0.5)
        with torch.no_grad():  # errors that point alike, so that the scaling bites
            t.policy_loser.copy_(t.target_loser + 2 * (t.policy_winner - t.target_winner))
        out = dpo_loss(*t, beta=3.0, loser_scaling=0.3, margin_graph=by_margin)
        (sigmoid(out.margin) if by_margin else out.loss).backward()
        grads.append((t.policy_winner.grad, t.policy_loser.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_margin_has_a_graph_on_request_only(dpo_loss: Loss) -> None:
    tensors = random_tensors(2, 6)
    plain, asked = dpo_loss(*tensors), dpo_loss(*tensors, margin_graph=True)
    assert plain.loss.requires_grad
    assert not plain.margin.requires_grad
    assert asked.margin.requires_grad
    assert torch.equal(plain.margin, asked.margin)
    assert not any(value.requires_grad for value in asked[2:])
    with torch.no_grad():
        assert not dpo_loss(*tensors, margin_graph=True).margin.requires_grad


def test_asking_for_the_margin_leaves_the_losss_gradient_to_the_bit(dpo_loss: Loss) -> None:
    grads = []
    for asked in (False, True):
        tensors = random_tensors(3, 700, dtype=torch.bfloat16)
        dpo_loss(*tensors, margin_graph=asked).loss.backward()
        grads.append((tensors.policy_winner.grad, tensors.policy_loser.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_margin_has_no_second_derivative(dpo_loss: Loss) -> None:
    tensors = random_tensors(1, 5)
    margin = dpo_loss(*tensors, margin_graph=True).margin
    (grad,) = torch.autograd.grad(margin.sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("margin_graph", [False, True])
def test_compiled_as_eager(margin_graph: bool, backend: str) -> None:
    def step(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = paired_dpo_loss(*tensors, beta=30.0, backend=backend, margin_graph=margin_graph)
        return out.loss, out.margin, out.policy_winner_error

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = random_tensors(2, 12)
        loss, margin, error = run(*tensors)
        assert margin.requires_grad == margin_graph
        assert not error.requires_grad
        (loss + hinge(margin) if margin_graph else loss).backward()
        results.append((loss, margin, error, tensors.policy_winner.grad, tensors.policy_loser.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backward", [sequential_backward, partial(single_pair_backward, [])])
def test_one_member_at_a_time_there_is_no_graph_to_ask_for(backward: Callable[..., PairedDPOLoss]) -> None:
    winner, loser, *constants = random_tensors(1, 5)
    with pytest.raises(ValueError, match=r"^margin_graph=True must be left out here: .*paired_dpo_loss$"):
        backward(lambda: winner, lambda: loser, *constants, margin_graph=True)
