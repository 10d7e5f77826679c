"""Numbers per pair in every form that trainers hold them: beta, pair_weight and target_scales take the same ones."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from pair_tensors import Loss, random_tensors
from torch import Tensor
from vpo_kernels import paired_dpo_loss, single_pair_backward

NOISE = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
ARGUMENTS = ("beta", "pair_weight", "target_scales[0]", "target_scales[1]")


def options(name: str, value: object) -> dict[str, Any]:
    if name == "target_scales[0]":
        return {"target_noise": NOISE, "target_scales": (value, -1.0)}
    if name == "target_scales[1]":
        return {"target_noise": NOISE, "target_scales": (1.0, value)}
    return {name: value}


TAKEN: dict[str, Callable[[float], object]] = {
    "float": float,
    "int": int,
    "fraction": Fraction,
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "numpy int64": np.int64,
    "scalar tensor": torch.tensor,
    "scalar tensor of bfloat16": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "parameter": lambda value: torch.nn.Parameter(torch.tensor(value)),
    "tensor [1]": lambda value: torch.tensor([value]),
    "tensor [P]": lambda value: torch.tensor([value, value]),
}


@pytest.mark.parametrize("form", TAKEN)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_form_of_a_number_gives_the_same_bits(name: str, form: str, dpo_loss: Loss) -> None:
    results = []
    for value in (2.0, TAKEN[form](2.0)):
        tensors = random_tensors(2, 9)
        out = dpo_loss(*tensors, **options(name, value))
        out.loss.backward()
        results.append([*(x.detach() for x in out), tensors.policy_winner.grad, tensors.policy_loser.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_weight_scales_the_loss(dpo_loss: Loss) -> None:
    plain, weighted = dpo_loss(*random_tensors(2, 9)), dpo_loss(*random_tensors(2, 9), pair_weight=0.7)
    torch.testing.assert_close(weighted.loss, 0.7 * plain.loss)
    assert torch.equal(weighted.margin, plain.margin)


REFUSED: list[tuple[object, str]] = [
    ([1.0, 2.0], r"\[1.0, 2.0\].*torch.as_tensor makes one of a list or an array"),
    ((1.0, 2.0), r"\(1.0, 2.0\).*torch.as_tensor"),
    (np.array([1.0, 2.0]), r"array\(\[1., 2.\]\).*torch.as_tensor"),
    (np.array(2.0), r"array\(2.\).*torch.as_tensor"),
    ("2", r"'2'.*a finite number"),
    (True, r"True.*a finite number"),
    (np.bool_(True), r"True.*a finite number"),
    (float("nan"), r"nan.*a finite number"),
    (np.float32("inf"), r"inf.*a finite number"),
    (2 + 0j, r"2\+0j.*a finite number"),
    (torch.ones(3), r"is \[3\], but must be a finite number or a tensor \[2\]"),
    (torch.ones(2, 1), r"is \[2, 1\], but must be"),
    (torch.tensor(2), r"has dtype torch.int64, .*\.float\(\)"),
    (torch.tensor([2]), r"has dtype torch.int64, .*\.float\(\)"),
    (torch.tensor([2, 2]), r"has dtype torch.int64, .*\.float\(\)"),
    (torch.tensor(True), r"has dtype torch.bool, .*\.float\(\)"),
    (torch.ones((), device="meta"), r"is on meta, .*\.to\('cpu'\)"),
]


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(("value", "message"), REFUSED, ids=repr)
def test_everything_else_is_refused_in_the_same_words(name: str, value: object, message: str) -> None:
    start = "^" + name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=f"{start}[ =].*{message}"):
        paired_dpo_loss(*random_tensors(2, 9), **options(name, value))


@pytest.mark.parametrize("name", ["winner_anchor", "loser_scaling"])
@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_numbers_for_all_pairs_may_be_numpys(name: str, number: Any, dpo_loss: Loss) -> None:
    ours, plain = (dpo_loss(*random_tensors(2, 9), **{name: value}) for value in (number, 0.5))
    assert torch.equal(ours.loss, plain.loss)


@pytest.mark.parametrize("scales", [(1.0,), 1.0, torch.ones(2), (1.0, 2.0, 3.0)], ids=repr)
def test_scales_that_are_not_two_are_refused(scales: object) -> None:
    with pytest.raises(ValueError, match=r"^target_scales is .*must be two scales \(a, b\)"):
        paired_dpo_loss(*random_tensors(2, 9), target_noise=NOISE, target_scales=scales)


@pytest.mark.parametrize("beta", [3, np.float64(3), torch.tensor(3.0), torch.tensor([3.0])], ids=repr)
def test_one_pair_at_a_time_takes_the_same_betas(beta: Any) -> None:
    weight = torch.ones(5, requires_grad=True)
    tensors = [t.detach() for t in random_tensors(1, 5)]

    def predict(which: int) -> Callable[[], Tensor]:
        return lambda: weight * tensors[which]

    single_pair_backward([weight], predict(0), predict(1), *tensors[2:], beta=beta)
    ours, weight.grad = weight.grad, None
    paired_dpo_loss(predict(0)(), predict(1)(), *tensors[2:], beta=3.0).loss.backward()
    torch.testing.assert_close(ours, weight.grad)
