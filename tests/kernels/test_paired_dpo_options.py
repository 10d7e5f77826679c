"""Targets formed inside, beta per pair, winner anchor and loser scaling, on every backend."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_tensors import ARRAYS, GOLDEN, Loss, assert_golden, close, halves, random_tensors, split, stored
from torch import Tensor
from vpo_kernels import error_weight
from vpo_kernels.paired_dpo.contract import PairTensors

DATA = Path(__file__).parents[1] / "data" / "dpo"
BASELINES = json.loads((DATA / "baselines_dpo.json").read_text())
SCALING = {name: torch.from_numpy(array) for name, array in np.load(DATA / "baselines_dpo.npz").items()}


def grads(tensors: PairTensors) -> tuple[Tensor, Tensor]:
    winner, loser = tensors.policy_winner.grad, tensors.policy_loser.grad
    assert winner is not None
    assert loser is not None
    return winner, loser


def fresh(tensors: PairTensors) -> PairTensors:
    return PairTensors(*(t.detach().clone().requires_grad_(i < 2) for i, t in enumerate(tensors)))


# --- targets formed inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", ["numbers", "tensors", "mixed"])
def test_a_target_formed_inside_equals_one_given(dtype: torch.dtype, scales: str, dpo_loss: Loss) -> None:
    inside = random_tensors(3, 4, 5, 7, dtype=dtype)
    noise = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    a, b = torch.tensor([-0.5, 1.0, 0.25]), torch.tensor([0.75, -1.0, 2.0])
    pair = {"numbers": (0.5, -1.5), "tensors": (a, b), "mixed": (a, -1.5)}[scales]
    wide = [torch.as_tensor(s, dtype=torch.float64).reshape(-1, 1, 1, 1) for s in pair]
    targets = [wide[0] * t.double() + wide[1] * noise.double() for t in inside[4:]]
    given = PairTensors(*fresh(inside)[:4], *targets)  # float64 targets: unrounded, as inside
    a_out = dpo_loss(*inside, beta=100.0, target_noise=noise, target_scales=pair)
    b_out = dpo_loss(*given, beta=100.0)
    close(a_out.margin, b_out.margin, 1e-5 if dtype != torch.float64 else 1e-12)
    a_out.loss.backward()
    b_out.loss.backward()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for mine, theirs in zip(grads(inside), grads(given), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs.double()).abs().max() <= bound * theirs.double().abs().max()


def test_golden_velocity_formed_inside(dpo_loss: Loss) -> None:
    """Open-Sora's velocity x0 - noise, from the stored latents and noise."""
    case = GOLDEN["flow"]["v_space_constant_beta"][3]
    x0, noise = split(ARRAYS["flow_x0"]), split(ARRAYS["flow_noise"])
    assert torch.equal(*noise)  # the pair shares it
    policy, reference = -ARRAYS["flow_v_pred"], -ARRAYS["flow_v_ref"]
    tensors = PairTensors(*(t.clone().requires_grad_() for t in split(policy)), *split(reference), *x0)
    out = dpo_loss(*tensors, beta=case["beta"], target_noise=noise[0], target_scales=(1.0, -1.0))
    close(out.margin, case["inside_term"])
    close(out.loss, case["loss"])


def test_masked_elements_of_the_noise_may_be_nan(dpo_loss: Loss) -> None:
    tensors, noise = random_tensors(2, 3, 8), torch.randn(2, 3, 8)
    mask = torch.arange(8) < 5
    clean = dpo_loss(*tensors, mask=mask, target_noise=noise, target_scales=(1.0, -1.0))
    noise = noise.masked_fill(~mask, torch.nan)
    out = dpo_loss(*tensors, mask=mask, target_noise=noise, target_scales=(1.0, -1.0))
    out.loss.backward()
    assert torch.equal(out.margin, clean.margin)
    assert all(grad.isfinite().all() for grad in grads(tensors))


# --- beta per pair ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_beta_per_pair_equals_pairs_alone(dtype: torch.dtype, dpo_loss: Loss) -> None:
    tensors, beta = random_tensors(4, 33), torch.tensor([1.0, 250.0, 500.0, 4096.0])
    out = dpo_loss(*tensors, beta=beta.to(dtype))
    (out.loss * 4).backward()
    for pair in range(4):
        alone = fresh(PairTensors(*(t[pair : pair + 1] for t in tensors)))
        single = dpo_loss(*alone, beta=float(beta[pair]))
        single.loss.backward()
        assert torch.equal(single.margin[0], out.margin[pair])
        assert torch.equal(alone.policy_winner.grad[0], tensors.policy_winner.grad[pair])


def test_golden_weight_inside_the_sigmoid(dpo_loss: Loss) -> None:
    case = GOLDEN["lat5d_timestep_weight_inside_sigmoid"]
    tensors = stored("lat5d")
    out = dpo_loss(*tensors, beta=case["beta"] * torch.tensor(case["weights"], dtype=torch.float64))
    assert_golden(out, case, tensors, ARRAYS["lat5d_probe"])


@pytest.mark.parametrize("space", ["epsilon", "x0"])
@pytest.mark.parametrize("index", range(3))
def test_golden_flow_weighted_by_time(space: str, index: int, dpo_loss: Loss) -> None:
    t = ARRAYS["flow_t"][:3]
    key = {
        "epsilon": "eps_space_constant_beta__equals_v_space_with_weight_(1-t)^2",
        "x0": "x0_space_constant_beta__equals_v_space_with_weight_t^2",
    }[space]
    case = GOLDEN["flow"][key][index]
    velocity = ARRAYS["flow_noise"] - ARRAYS["flow_x0"]
    tensors = halves(ARRAYS["flow_v_pred"], ARRAYS["flow_v_ref"], velocity)
    out = dpo_loss(*tensors, beta=case["beta"] * error_weight(space, 1 - t, t))
    assert_golden(out, case, tensors, ARRAYS["flow_probe"])


def test_error_weight_of_the_prediction_is_one_and_unknown_spaces_are_refused() -> None:
    t = torch.tensor([0.25, 0.5])
    assert error_weight("prediction", 1 - t, t).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"space='v' must be one of: prediction, epsilon, x0"):
        error_weight("v", 1 - t, t)  # type: ignore[arg-type]


# --- winner anchor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_anchor_adds_the_winners_error(reduction: str, masked: bool, dpo_loss: Loss) -> None:
    tensors = random_tensors(3, 2, 5, dtype=torch.float64)
    mask = torch.arange(5) < 3 if masked else None
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    options = {"beta": 3.0, "reduction": reduction, "mask": mask, "pair_weight": weight}
    plain, anchored = dpo_loss(*tensors, **options), dpo_loss(*tensors, **options, winner_anchor=0.3)
    square = (tensors.policy_winner - tensors.target_winner)[..., : 3 if masked else 5].square().flatten(1)
    error = square.mean(1) if reduction == "mean" else square.sum(1)
    torch.testing.assert_close(anchored.loss - plain.loss, 0.3 * (weight * error).mean())
    assert torch.equal(anchored.margin, plain.margin)

    def loss(winner: Tensor, loser: Tensor) -> Tensor:
        return dpo_loss(winner, loser, *tensors[2:], **options, winner_anchor=0.3).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors[:2]))


# --- loser scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpo_loser_scale", "sdpo_loser_scale_aligned"])
@pytest.mark.parametrize("mu", ["0.0", "0.3", "0.9"])
def test_golden_loser_scaling(name: str, mu: str, dpo_loss: Loss) -> None:
    case = BASELINES[name]
    policy, target = SCALING[case["pred"]].float(), SCALING[case["target"]].float()
    plain, scaled = halves(policy, policy, target), halves(policy, policy, target)
    before = dpo_loss(*plain, beta=500.0)
    after = dpo_loss(*scaled, beta=500.0, loser_scaling=float(mu))
    for out in (before, after):
        out.loss.backward()
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(scaled.policy_winner.grad, plain.policy_winner.grad)
    torch.testing.assert_close(
        scaled.policy_loser.grad, plain.policy_loser.grad * case["values"][mu], rtol=1e-5, atol=0
    )


def test_loser_scaling_keeps_the_winner_from_getting_worse(dpo_loss: Loss) -> None:
    """The policy moves both predictions alike; a step along its gradient must not make the winner's error grow."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(1, 50, dtype=torch.float64)
    winner = torch.randn(1, 50, generator=generator, dtype=torch.float64) * 0.2
    loser = winner * 5 + 0.01 * torch.randn(1, 50, generator=generator, dtype=torch.float64)
    for mu, grows in ((None, True), (0.0, False), (0.5, False)):
        shift = torch.zeros(1, 50, dtype=torch.float64, requires_grad=True)
        w, x = winner + shift, loser + shift
        dpo_loss(w, x, winner, loser, target, target, beta=10.0, loser_scaling=mu).loss.backward()
        change = float((2 * winner * -shift.grad).sum())
        assert (change > 1e-9) == grows


def test_scaling_leaves_opposed_pairs_alone(dpo_loss: Loss) -> None:
    tensors = random_tensors(1, 40)
    winner, loser = tensors.policy_winner.detach(), tensors.policy_loser.detach()
    opposed = PairTensors(
        *tensors[:4], tensors.target_winner, 2 * loser - (winner - tensors.target_winner) * 0 - loser
    )
    with torch.no_grad():
        opposed.target_loser.copy_(loser + (winner - tensors.target_winner))  # b = -a
    plain, scaled = fresh(opposed), fresh(opposed)
    dpo_loss(*plain).loss.backward()
    dpo_loss(*scaled, loser_scaling=0.9).loss.backward()
    assert torch.equal(plain.policy_loser.grad, scaled.policy_loser.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_scaling_and_anchor_of_a_batch_equal_singles(masked: bool, dpo_loss: Loss) -> None:
    tensors = random_tensors(4, 3, 50, drift=0.5)
    with torch.no_grad():  # errors that point alike, so that the scaling bites
        for pair in range(4):
            tensors.policy_loser[pair] = tensors.target_loser[pair] + (pair + 1) * 0.7 * (
                tensors.policy_winner[pair] - tensors.target_winner[pair]
            )
    options = {"loser_scaling": 0.2, "winner_anchor": 0.1, "mask": torch.arange(50) < 33 if masked else None}
    out = dpo_loss(*tensors, **options)
    (out.loss * 4).backward()
    for pair in range(4):
        alone = fresh(PairTensors(*(t[pair : pair + 1] for t in tensors)))
        dpo_loss(*alone, **options).loss.backward()
        assert torch.equal(alone.policy_loser.grad[0], tensors.policy_loser.grad[pair])
        assert torch.equal(alone.policy_winner.grad[0], tensors.policy_winner.grad[pair])
