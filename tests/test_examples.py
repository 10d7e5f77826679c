"""The examples: the fused loss replaces the loss of other training loops, and changes nothing but the cost."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils import parameters_to_vector

EXAMPLES = Path(__file__).parents[1] / "examples"
EPSILON = torch.finfo(torch.float32).eps
LN2 = math.log(2.0)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradient(network: nn.Module) -> Tensor:
    """Return all gradients as one float64 vector."""
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).double()


def weights(network: nn.Module) -> Tensor:
    """Return all weights as one float64 vector."""
    return parameters_to_vector(network.parameters()).detach().double()


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of the expected."""
    return ((actual - expected).norm() / expected.norm()).item()


# --- embed_loss.py ---------------------------------------------------------------------------------------


def test_the_plain_loop_learns_and_refreshes() -> None:
    margins = load("embed_loss").train(steps=60)
    assert margins[0] == margins[50] == 0.0  # right after the start and after a refresh
    assert margins[49] > 0.5


# --- diffusers_trainer.py --------------------------------------------------------------------------------

BETA = 200.0
ROUNDING = 4 * BETA * EPSILON
"""The eager margin is beta / 2 times a sum of four float32 means of about 1, each of which errs by about an epsilon.
Loss and gradient err by as much, relative to ln 2 and to their own size."""


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    return load("diffusers_trainer")


def test_a_diffusers_trainer_ends_where_it_did_with_the_fused_loss(trainer: ModuleType) -> None:
    torch.manual_seed(0)
    start = weights(trainer.tiny_unet())
    eager, eager_losses = trainer.train(fused=False, steps=6, beta=BETA)
    fused, fused_losses = trainer.train(fused=True, steps=6, beta=BETA)
    assert fused_losses[0] == pytest.approx(LN2, abs=EPSILON)
    assert fused_losses == pytest.approx(eager_losses, abs=ROUNDING)
    assert max(eager_losses[1:]) < LN2  # it did move
    assert relative(gradient(fused), gradient(eager)) < ROUNDING
    assert relative(weights(fused) - start, weights(eager) - start) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_prediction_alike(trainer: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    target, error, drift = torch.randn(3, 6, 4, 8, 8)
    reference = (target + error).to(dtype)
    grads = []
    for fused in (False, True):
        prediction = (target + error + 0.02 * drift).to(dtype).requires_grad_()
        loss, margin = trainer.preference_loss(prediction, reference, target.to(dtype), BETA, fused)
        (grad,) = torch.autograd.grad(loss, prediction)
        grads.append(grad.double())
        assert margin.shape == (3,)
        assert loss.dtype == margin.dtype == torch.float32
    assert grads[0].norm() > 0
    assert relative(grads[1], grads[0]) < max(ROUNDING, torch.finfo(dtype).eps)


def test_twice_the_beta_of_diffusers_scripts(trainer: ModuleType) -> None:
    """They write -logsigmoid(beta_dpo * (reference difference - model difference)), without a half."""
    torch.manual_seed(2)
    target, error, drift = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    prediction, reference = target + error + 0.02 * drift, target + error
    model_w, model_l = (prediction - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)
    reference_w, reference_l = (reference - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)
    beta_dpo = 100.0
    theirs = -logsigmoid(beta_dpo * ((reference_w - reference_l) - (model_w - model_l))).mean()
    ours, _ = trainer.preference_loss(prediction, reference, target, 2 * beta_dpo, fused=True)
    torch.testing.assert_close(ours, theirs)


def test_summed_errors_need_beta_times_the_elements(trainer: ModuleType) -> None:
    torch.manual_seed(3)
    target, error, drift = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    prediction, reference = target + error + 0.02 * drift, target + error
    error_change = ((prediction - target).pow(2) - (reference - target).pow(2)).sum(dim=(1, 2, 3))
    beta_sum = 0.5
    theirs = -logsigmoid(-beta_sum / 2 * (error_change[:2] - error_change[2:])).mean()
    ours, _ = trainer.preference_loss(prediction, reference, target, beta_sum * target[0].numel(), fused=True)
    torch.testing.assert_close(ours, theirs)


# --- sequential_loss.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequential() -> ModuleType:
    return load("sequential_loss")


class Kept:
    """An activation kept for the backward pass. The class counts the bytes of those that are alive."""

    alive = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.alive += tensor.nbytes
        Kept.peak = max(Kept.peak, Kept.alive)

    def __del__(self) -> None:
        Kept.alive -= self.tensor.nbytes


def peak_of_step(sequential: ModuleType, mode: str, pairs: int) -> int:
    """Return the most bytes of activations that are alive at once during a step."""
    torch.manual_seed(0)
    policy, reference = sequential.Denoiser(), sequential.Denoiser().requires_grad_(False)
    winner, loser = torch.randn(2, pairs, 1024, 16)
    Kept.alive = Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        sequential.backward(mode, policy, reference, winner, loser)
    return Kept.peak


@pytest.mark.parametrize(("mode", "pairs"), [("sequential", 1), ("sequential", 3), ("single pair", 1)])
def test_one_after_the_other_trains_alike(sequential: ModuleType, mode: str, pairs: int) -> None:
    torch.manual_seed(0)
    start = weights(sequential.Denoiser())
    joint, joint_losses = sequential.train("joint", steps=5, pairs=pairs)
    other, losses = sequential.train(mode, steps=5, pairs=pairs)
    assert losses == pytest.approx(joint_losses, rel=1e-5)
    assert joint_losses[-1] < joint_losses[0]
    assert relative(gradient(other), gradient(joint)) < 1e-5
    assert relative(weights(other) - start, weights(joint) - start) < 1e-4


@pytest.mark.parametrize(("mode", "pairs"), [("sequential", 3), ("single pair", 1)])
def test_one_after_the_other_keeps_half_the_activations(
    sequential: ModuleType, mode: str, pairs: int
) -> None:
    assert peak_of_step(sequential, mode, pairs) < 0.6 * peak_of_step(sequential, "joint", pairs)
