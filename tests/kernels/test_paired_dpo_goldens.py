"""The paired loss compared with the losses of the public code, at the stated tolerance."""

import numpy as np
import pytest
import torch
from pair_tensors import (
    ARRAYS,
    GOLDEN,
    LARGE,
    Loss,
    assert_golden,
    close,
    halves,
    large_case,
    scaled,
    split,
    stored,
)
from vpo_kernels.paired_dpo.contract import PairTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["eps4d", "lat5d"])
@pytest.mark.parametrize("index", range(6))
def test_golden(dpo_loss: Loss, name: str, index: int, dtype: torch.dtype) -> None:
    case = GOLDEN[name]["cases"][index]
    tensors = stored(name, dtype)
    out = dpo_loss(*tensors, beta=case["beta"])
    assert out.loss.dtype == out.margin.dtype == dtype
    winner_error, loser_error = split(torch.tensor(case["model_losses"], dtype=torch.float64))
    winner_reference, loser_reference = split(torch.tensor(case["ref_losses"], dtype=torch.float64))
    close(out.winner_error_change, winner_error - winner_reference, 1e-8)
    close(out.loser_error_change, loser_error - loser_reference, 1e-8)
    assert_golden(out, case, tensors, ARRAYS[f"{name}_probe"])
    if case["beta"] == 5000:
        expected = ARRAYS[f"{name}_grad_beta5000"]
        actual = torch.cat([tensors.policy_winner.grad, tensors.policy_loser.grad]).double()
        bound = 1e-5 if dtype == torch.float32 else 1e-12
        assert (actual - expected).abs().max() <= bound * expected.abs().max()


def test_golden_swapped(dpo_loss: Loss) -> None:
    w, loser, *rest = stored("eps4d")
    swapped = PairTensors(loser, w, rest[1], rest[0], rest[3], rest[2])
    assert_golden(dpo_loss(*swapped, beta=2000.0), GOLDEN["eps4d_swapped_beta2000"])


def test_golden_policy_equals_reference(dpo_loss: Loss) -> None:
    case = GOLDEN["eps4d_policy_equals_ref_beta5000"]
    tensors = halves(ARRAYS["eps4d_model_pred"], ARRAYS["eps4d_model_pred"], ARRAYS["eps4d_target"])
    out = dpo_loss(*tensors, beta=case["beta"])
    assert_golden(out, case, tensors, ARRAYS["eps4d_probe"])


@pytest.mark.parametrize("index", range(3))
def test_golden_bf16_inputs(dpo_loss: Loss, index: int) -> None:
    case = GOLDEN["eps4d_bf16_inputs"]["cases"][index]
    tensors = stored("eps4d", torch.bfloat16)
    out = dpo_loss(*tensors, beta=case["beta"])
    assert out.loss.dtype == out.margin.dtype == torch.float32
    assert_golden(out, case)
    out.loss.backward()
    for policy, key in ((tensors.policy_winner, "grad_l2_w"), (tensors.policy_loser, "grad_l2_l")):
        assert policy.grad is not None
        assert policy.grad.dtype == torch.bfloat16
        # Rounding to bf16 moves an entry by at most 2^-9 of it; over 512 entries the norm moves far less.
        assert policy.grad.double().norm().item() == pytest.approx(case[key], rel=2**-9)


def from_errors(case: dict, dtype: torch.dtype) -> PairTensors:
    """Return samples of one element whose squared errors are the given ones."""
    zero = torch.zeros(len(case["model_w"]), 1, dtype=dtype)
    model_w, model_l, ref_w, ref_l = (
        torch.tensor(case[key], dtype=torch.float64).sqrt().to(dtype)[:, None]
        for key in ("model_w", "model_l", "ref_w", "ref_l")
    )
    return PairTensors(model_w.requires_grad_(), model_l.requires_grad_(), ref_w, ref_l, zero, zero)


def test_golden_extreme_margins(dpo_loss: Loss) -> None:
    case = GOLDEN["extreme_from_per_sample_errors"]["cases"][0]
    tensors = from_errors(case, torch.float64)
    out = dpo_loss(*tensors, beta=case["beta"])
    close(out.margin, case["inside"], 1e-9)
    close(out.loss, case["loss"], 1e-9)
    out.loss.backward()
    for policy, key in ((tensors.policy_winner, "grad_model_w"), (tensors.policy_loser, "grad_model_l")):
        per_error = policy.grad / (2 * policy.detach())  # d error = 2 * policy * d policy
        close(per_error[:, 0], case[key], 1e-9)


def test_extreme_margins_are_finite_in_float32(dpo_loss: Loss) -> None:
    case = GOLDEN["extreme_from_per_sample_errors"]["cases"][0]
    tensors = from_errors(case, torch.float32)
    out = dpo_loss(*tensors, beta=case["beta"])
    out.loss.backward()
    assert out.margin.abs().max() > 9e5
    for tensor in (*out, tensors.policy_winner.grad, tensors.policy_loser.grad):
        assert tensor.isfinite().all()
    assert out.loss.item() == pytest.approx(case["loss"], rel=1e-4)


def test_golden_both_likelihoods_fall(dpo_loss: Loss) -> None:
    """Accuracy is 1 and the loss under ln 2 while the winner gets less likely; the two error changes must show it."""
    case = GOLDEN["both_likelihoods_fall"]
    out = dpo_loss(*from_errors(case, torch.float64), beta=case["beta"])
    assert_golden(out, case)
    close(-case["beta"] / 2 * out.winner_error_change, case["implicit_reward_w"], 1e-9)
    close(-case["beta"] / 2 * out.loser_error_change, case["implicit_reward_l"], 1e-9)
    assert (out.winner_error_change > 0).all()
    assert (out.margin > 0).all()


def test_golden_sum_vs_mean(dpo_loss: Loss) -> None:
    case = GOLDEN["sum_vs_mean"]
    by_sum, by_mean = stored("lat5d"), stored("lat5d")
    summed = dpo_loss(*by_sum, beta=case["beta_sum"], reduction="sum")
    averaged = dpo_loss(*by_mean, beta=case["beta_mean"], reduction="mean")
    close(summed.loss, case["loss"])
    close(averaged.loss, case["loss"])
    close(summed.winner_error_change, averaged.winner_error_change.double() * case["D"])
    summed.loss.backward()
    averaged.loss.backward()
    torch.testing.assert_close(by_sum.policy_winner.grad, by_mean.policy_winner.grad, rtol=1e-5, atol=1e-7)


def test_golden_timestep_weight_inside_sigmoid(dpo_loss: Loss) -> None:
    case = GOLDEN["lat5d_timestep_weight_inside_sigmoid"]
    tensors = stored("lat5d")
    out = dpo_loss(*scaled(tensors, torch.tensor(case["weights"], dtype=torch.float64)), beta=case["beta"])
    assert_golden(out, case, tensors, ARRAYS["lat5d_probe"])


def flow_tensors(sign: float) -> PairTensors:
    """Return the flow's tensors: v = noise - x0 for sign +1, Open-Sora's v = x0 - noise for -1."""
    velocity = ARRAYS["flow_noise"] - ARRAYS["flow_x0"]
    return halves(*(sign * part for part in (ARRAYS["flow_v_pred"], ARRAYS["flow_v_ref"], velocity)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("index", range(6))
def test_golden_flow(dpo_loss: Loss, index: int, sign: float) -> None:
    case = GOLDEN["flow"]["v_space_constant_beta"][index]
    tensors = flow_tensors(sign)
    out = dpo_loss(*tensors, beta=case["beta"])
    signed = {
        key: sign * value if key in ("grad_sum", "grad_dot_probe") else value for key, value in case.items()
    }
    assert_golden(out, signed, tensors, ARRAYS["flow_probe"])


@pytest.mark.parametrize("space", ["eps", "x0"])
@pytest.mark.parametrize("index", range(3))
def test_golden_flow_in_other_spaces(dpo_loss: Loss, space: str, index: int) -> None:
    t = ARRAYS["flow_t"][:3]
    key, weight = {
        "eps": ("eps_space_constant_beta__equals_v_space_with_weight_(1-t)^2", (1 - t) ** 2),
        "x0": ("x0_space_constant_beta__equals_v_space_with_weight_t^2", t**2),
    }[space]
    case = GOLDEN["flow"][key][index]
    tensors = flow_tensors(1.0)
    assert_golden(dpo_loss(*scaled(tensors, weight), beta=case["beta"]), case, tensors, ARRAYS["flow_probe"])


@pytest.mark.parametrize("space", ["v", "eps"])
def test_golden_ddpm_v_prediction(dpo_loss: Loss, space: str) -> None:
    block = GOLDEN["ddpm_v_prediction"]
    random = np.random.RandomState(block["seed"])
    alphas = np.tile(random.uniform(0.05, 0.99, 3), 2)
    np.testing.assert_allclose(alphas, block["alphas_cumprod"], rtol=1e-12)
    shape = ARRAYS["flow_x0"].shape
    first, second = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    a = torch.from_numpy(alphas).reshape(-1, 1, 1, 1, 1)
    target = a.sqrt() * ARRAYS["flow_noise"] - (1 - a).sqrt() * ARRAYS["flow_x0"]
    policy = target + 0.6 * torch.from_numpy(first)
    reference = policy + 0.002 * torch.from_numpy(second)
    tensors = halves(policy, reference, target)
    if space == "eps":
        tensors = PairTensors(*(tensor * a[:3].sqrt() for tensor in tensors))
    assert_golden(dpo_loss(*tensors, beta=2000.0), block[f"{space}_space_beta2000"])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("index", range(3))
def test_golden_large(dpo_loss: Loss, which: int, index: int) -> None:
    case = LARGE["cases"][which]
    tensors, probe = large_case(case)
    golden = case["betas"][index]
    assert_golden(dpo_loss(*tensors, beta=golden["beta"]), golden, tensors, probe)
