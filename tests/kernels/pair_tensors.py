"""Tensors to test the paired loss with: stored ones with known losses, and random ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vpo_kernels import PairedDPOLoss
from vpo_kernels.paired_dpo.contract import PairTensors

DATA = Path(__file__).parents[1] / "data" / "dpo"
GOLDEN = json.loads((DATA / "dpo_loss.json").read_text())
LARGE = json.loads((DATA / "dpo_large.json").read_text())
ARRAYS = {name: torch.from_numpy(array) for name, array in np.load(DATA / "dpo_loss.npz").items()}
TOLERANCE = 1e-5  # what the goldens ask of a float32 implementation, on loss and margin
LN2 = math.log(2.0)
Loss = Callable[..., PairedDPOLoss]
"""``paired_dpo_loss`` of one backend, see conftest.py."""


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return winners and losers, the halves of a batch in the public code's order."""
    half = tensor.shape[0] // 2
    return tensor[:half], tensor[half:]


def halves(policy: Tensor, reference: Tensor, target: Tensor) -> PairTensors:
    """Return the tensors of batches in the public code's order; the policy's are leaves that require gradients."""
    winner, loser = (half.detach().clone().requires_grad_() for half in split(policy))
    return PairTensors(winner, loser, *split(reference), *split(target))


def stored(name: str, dtype: torch.dtype = torch.float32) -> PairTensors:
    return halves(*(ARRAYS[f"{name}_{part}"].to(dtype) for part in ("model_pred", "ref_pred", "target")))


def scaled(tensors: PairTensors, weight: Tensor) -> PairTensors:
    """Apply a weight [P] inside the sigmoid through the tensors, with whose square errors grow.

    It is done in float64, because rounding scaled predictions would lose digits of their small difference.
    """
    factor = weight.double().sqrt().reshape(-1, *[1] * (tensors.policy_winner.ndim - 1))
    return PairTensors(*(tensor * factor for tensor in tensors))


def random_tensors(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, drift: float = 0.02
) -> PairTensors:
    """Return random tensors, policy near reference as in training; the policy's require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = normal(), normal()
    references = tuple(target + 0.5 * normal() for target in targets)
    policies = tuple((reference + drift * normal()).to(dtype).requires_grad_() for reference in references)
    return PairTensors(*policies, *(t.to(dtype) for t in references), *(t.to(dtype) for t in targets))


def close(actual: Tensor, expected: object, tolerance: float = TOLERANCE) -> None:
    """Assert equality within ``tolerance``, absolute and, above 1, relative."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    error = (actual.detach().double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max().item() <= tolerance, (actual, wanted)


def assert_golden(
    out: PairedDPOLoss, case: dict, tensors: PairTensors | None = None, probe: Tensor | None = None
) -> None:
    """Assert loss and margin within 1e-5, and gradients by norms, sum, largest entry and a random projection to 1e-4.

    The projection and the sum cancel, so their error is judged against the norm. 1e-4 is the float32 error
    of the margin (1e-5) through the slope of the sigmoid, with room for rounding of the gradient itself.
    """
    close(out.loss, case["loss"])
    close(out.margin, case["inside_term"])
    if tensors is None:
        return
    out.loss.backward()
    winner, loser = tensors.policy_winner.grad, tensors.policy_loser.grad
    assert winner is not None
    assert loser is not None
    both = torch.cat([winner, loser]).double()
    norm = math.hypot(case["grad_l2_w"], case["grad_l2_l"])
    assert winner.double().norm().item() == pytest.approx(case["grad_l2_w"], rel=1e-4)
    assert loser.double().norm().item() == pytest.approx(case["grad_l2_l"], rel=1e-4)
    if "grad_absmax" in case:
        assert both.abs().max().item() == pytest.approx(case["grad_absmax"], rel=1e-4)
        assert both.sum().item() == pytest.approx(case["grad_sum"], abs=1e-4 * norm)
    if probe is not None:
        assert (both * probe.double()).sum().item() == pytest.approx(case["grad_dot_probe"], abs=1e-4 * norm)


def large_case(case: dict) -> tuple[PairTensors, Tensor]:
    random = np.random.RandomState(case["seed"])
    shape = tuple(case["shape"])
    if case["shared_target"]:
        target = np.concatenate([random.standard_normal((shape[0] // 2, *shape[1:]))] * 2)
    else:
        target = random.standard_normal(shape)
    error, drift, probe = (random.standard_normal(shape) for _ in range(3))
    sign = np.concatenate([np.ones(shape[0] // 2), -np.ones(shape[0] // 2)]).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    policy = target + case["a"] * error
    reference = policy + case["d"] * drift + case["g"] * sign * error
    checks = case["input_checks"]
    policy, reference, target, probe = (x.astype(np.float32) for x in (policy, reference, target, probe))
    assert policy.astype(np.float64).sum() == pytest.approx(checks["model_pred_sum"], rel=1e-6)
    assert reference.astype(np.float64).sum() == pytest.approx(checks["ref_pred_sum"], rel=1e-6)
    return halves(*map(torch.from_numpy, (policy, reference, target))), torch.from_numpy(probe)
