"""The sequential modes give the joint gradient with one graph at a time."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from vpo_kernels import paired_dpo_loss, sequential_backward, single_pair_backward

OPTIONS: list[dict] = [
    {"beta": 5.0},
    {"beta": 5.0, "reduction": "sum"},
    {"beta": 50.0, "winner_anchor": 0.5, "loser_scaling": 0.3},
    {"beta": 5.0, "mask": torch.arange(9) < 6},
]


class Problem:
    """A policy near its reference and a batch of pairs, in float64."""

    def __init__(self, pairs: int) -> None:
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(9, 16), nn.SiLU(), nn.Linear(16, 9)).double()
        reference = copy.deepcopy(self.policy)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.winner, self.loser, noise = torch.randn(3, pairs, 9).double()
        with torch.no_grad():
            self.constants = [reference(self.winner), reference(self.loser), noise, noise + 1]
        self.graphs = 0

    def joint(self, **options: object) -> tuple[object, list[Tensor]]:
        out = paired_dpo_loss(self.policy(self.winner), self.policy(self.loser), *self.constants, **options)
        out.loss.backward()
        return out, self.gradients()

    def gradients(self) -> list[Tensor]:
        grads = [parameter.grad.clone() for parameter in self.policy.parameters()]
        self.policy.zero_grad()
        return grads

    def predict(self, latents: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            prediction = self.policy(latents)
            if prediction.requires_grad:
                assert self.graphs == 0, "two graphs at a time"
                self.graphs += 1
                prediction.register_hook(lambda _: setattr(self, "graphs", 0))
            return prediction

        return run


def assert_same(actual: list[Tensor], expected: list[Tensor], factor: float = 1.0) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b * factor, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pairs", [1, 3])
def test_sequential_equals_joint(pairs: int, options: dict) -> None:
    problem = Problem(pairs)
    expected, gradient = problem.joint(**options)
    out = sequential_backward(
        problem.predict(problem.winner), problem.predict(problem.loser), *problem.constants, **options
    )
    assert_same(problem.gradients(), gradient)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b.detach())
        assert not a.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_single_pair_equals_joint(options: dict) -> None:
    problem = Problem(1)
    expected, gradient = problem.joint(**options)
    out = single_pair_backward(
        problem.policy.parameters(),
        problem.predict(problem.winner),
        problem.predict(problem.loser),
        *problem.constants,
        **options,
    )
    assert_same(problem.gradients(), gradient)
    assert torch.equal(out.margin, expected.margin)
    assert torch.equal(out.loss, expected.loss.detach())


def test_beta_per_pair() -> None:
    beta = torch.tensor([5.0, 50.0, 0.5], dtype=torch.float64)
    problem = Problem(3)
    _, gradient = problem.joint(beta=beta)
    sequential_backward(
        problem.predict(problem.winner), problem.predict(problem.loser), *problem.constants, beta=beta
    )
    assert_same(problem.gradients(), gradient)
    problem = Problem(1)
    _, gradient = problem.joint(beta=beta[:1])
    members = problem.predict(problem.winner), problem.predict(problem.loser)
    single_pair_backward(problem.policy.parameters(), *members, *problem.constants, beta=beta[:1])
    assert_same(problem.gradients(), gradient)


def test_forward_passes_are_counted() -> None:
    problem, calls = Problem(1), []
    problem.policy.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    members = problem.predict(problem.winner), problem.predict(problem.loser)
    sequential_backward(*members, *problem.constants)
    assert calls == [False, True, True]
    problem.policy.zero_grad()
    calls.clear()
    single_pair_backward(problem.policy.parameters(), *members, *problem.constants)
    assert calls == [True, True]


def test_scale_and_backward_reach_both_passes() -> None:
    problem, seen = Problem(1), []

    def backward(loss: Tensor) -> None:
        seen.append(float(loss.detach()))
        (loss * 4).backward()

    _, gradient = problem.joint()
    members = problem.predict(problem.winner), problem.predict(problem.loser)
    sequential_backward(*members, *problem.constants, scale=0.25, backward=backward)
    assert_same(problem.gradients(), gradient)
    assert len(seen) == 2
    single_pair_backward(
        problem.policy.parameters(), *members, *problem.constants, scale=0.25, backward=backward
    )
    assert_same(problem.gradients(), gradient)


def test_sequential_accumulates() -> None:
    problem = Problem(2)
    _, gradient = problem.joint()
    for _ in range(2):
        sequential_backward(
            problem.predict(problem.winner), problem.predict(problem.loser), *problem.constants, scale=0.5
        )
    assert_same(problem.gradients(), gradient)


@pytest.mark.parametrize("margin_scale", [1e4, -1e4])
def test_single_pair_at_saturated_margins(margin_scale: float) -> None:
    """The gradient is zero, not NaN, if the coefficient underflows."""
    problem = Problem(1)
    _, gradient = problem.joint(beta=abs(margin_scale) * 1e4)
    single_pair_backward(
        problem.policy.parameters(),
        problem.predict(problem.winner),
        problem.predict(problem.loser),
        *problem.constants,
        beta=abs(margin_scale) * 1e4,
    )
    assert_same(problem.gradients(), gradient)


def test_a_pair_of_weight_zero_leaves_zero() -> None:
    problem = Problem(1)
    single_pair_backward(
        problem.policy.parameters(),
        problem.predict(problem.winner),
        problem.predict(problem.loser),
        *problem.constants,
        pair_weight=torch.zeros(1),
    )
    assert all((grad == 0).all() for grad in problem.gradients())


def test_single_pair_refuses_several_pairs_and_old_gradients() -> None:
    problem = Problem(2)
    members = problem.predict(problem.winner), problem.predict(problem.loser)
    with pytest.raises(ValueError, match=r"shape \[2, 9\], but must be \[1, ...\]: .*sequential_backward"):
        single_pair_backward(problem.policy.parameters(), *members, *problem.constants)
    problem = Problem(1)
    problem.policy(problem.winner).sum().backward()
    with pytest.raises(ValueError, match=r"has a gradient already, .*zero_grad"):
        single_pair_backward(problem.policy.parameters(), *members, *problem.constants)
