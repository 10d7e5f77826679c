"""Algorithm 1: the invariants of DESIGN section 6, through the classes that ``train`` uses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from smallest_run import SHIPPED
from step_case import candidates_of, pairs_of, sample_candidates, step_on, times_and_noise
from torch import Tensor

from vpo_engine.build import build_model, build_reward
from vpo_engine.config import Config, OptimizerConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import learning_rate
from vpo_engine.method import Step
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import build_reference
from vpo_engine.run_state import capture, restore
from vpo_engine.selection import select_pairs
from vpo_engine.values import Pair

PROMPTS = ("a red circle moving left", "a blue square moving up")
Make = Callable[..., Config]


def make_algorithm(config: Config, reward: object = None) -> OnlineVPO:
    torch.manual_seed(0)
    processes = Processes.start("cpu")
    model = build_model(config, processes)
    model.prepare(PROMPTS)
    scorer = reward or build_reward(config, processes.device)
    return OnlineVPO(config, model, scorer, build_reference("copy", model.network), processes)  # type: ignore[arg-type]


def run_step(algorithm: OnlineVPO, number: int = 0) -> Step:
    return step_on(algorithm, PROMPTS, [2 * number, 2 * number + 1])


class ScriptedReward:
    """Scores candidates by a script, one row of numbers per call."""

    dimensions = ("temporal_consistency",)

    def __init__(self, *rows: Sequence[float]) -> None:
        self.rows = list(rows)
        self.seen: list[Tensor] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.seen.append(videos)
        row = self.rows.pop(0) if len(self.rows) > 1 else self.rows[0]
        return {"temporal_consistency": torch.tensor(row)}


def test_margin_is_zero_and_loss_ln2_right_after_every_refresh(small: Make) -> None:
    algorithm = make_algorithm(small("reference.refresh_every=1"))
    for number in range(3):
        metrics = run_step(algorithm, number).metrics
        assert metrics["margin"] == metrics["winner_error_change"] == metrics["loser_error_change"] == 0.0
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert metrics["grad_norm"] > 0


def test_margin_leaves_zero_once_the_policy_has_moved(small: Make) -> None:
    algorithm = make_algorithm(small("reference.refresh_every=null", "optimizer.lr=1e-3"))
    assert run_step(algorithm, 0).metrics["margin"] == 0.0
    assert run_step(algorithm, 1).metrics["margin"] != 0.0


@pytest.mark.long
def test_refresh_counts_optimizer_steps_not_steps(small: Make) -> None:
    tie, gap = [1.0] * 4, [0.0, 1.0, 2.0, 0.0]
    reward = ScriptedReward(gap, tie, tie, gap, gap)
    algorithm = make_algorithm(small("reference.refresh_every=2", "reward.dimensions=global"), reward)
    ages = [run_step(algorithm, number).metrics["reference_age"] for number in range(5)]
    assert ages == [1, 1, 1, 0, 1]
    assert algorithm.optimizer_steps == 3


def test_refresh_makes_the_reference_equal_to_the_policy(small: Make) -> None:
    algorithm = make_algorithm(small("reference.refresh_every=2", "optimizer.lr=1e-3"))
    before = {name: value.clone() for name, value in algorithm.reference.state_dict().items()}
    run_step(algorithm, 0)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.reference.state_dict().items())
    run_step(algorithm, 1)
    policy = algorithm.model.network.state_dict()
    assert all(torch.equal(value, policy[name]) for name, value in algorithm.reference.state_dict().items())


def test_ties_are_skipped_counted_and_leave_the_policy_alone(small: Make) -> None:
    algorithm = make_algorithm(small("reward.dimensions=global"), ScriptedReward([2.0, 2.0, 3.0, 3.0]))
    before = [parameter.clone() for parameter in algorithm.parameters]
    metrics = run_step(algorithm).metrics
    assert (metrics["tie_rate"], metrics["pairs"], metrics["optimizer_steps"]) == (1.0, 0, 0)
    assert "loss" not in metrics
    assert all(torch.equal(old, new) for old, new in zip(before, algorithm.parameters, strict=True))


def test_min_gap_widens_what_counts_as_a_tie(small: Make) -> None:
    scores = ScriptedReward([0.0, 0.4, 0.0, 0.6])
    metrics = run_step(make_algorithm(small("reward.dimensions=global", "pairs.min_gap=0.5"), scores)).metrics
    assert (metrics["tie_rate"], metrics["pairs"]) == (0.5, 1)


def test_winner_is_argmax_and_loser_argmin() -> None:
    pairs = select_pairs(torch.tensor([[0.3, 0.9, 0.1, 0.9], [2.0, 1.0, 3.0, 1.0]]))
    assert pairs.winner.tolist() == [1, 2]
    assert pairs.loser.tolist() == [2, 1]
    assert pairs.gap.tolist() == pytest.approx([0.8, 2.0])
    assert not pairs.tied.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_stops_the_step(small: Make, bad: float) -> None:
    algorithm = make_algorithm(small("reward.dimensions=global"), ScriptedReward([1.0, 2.0, bad, 1.0]))
    before = [parameter.clone() for parameter in algorithm.parameters]
    with pytest.raises(
        ValueError, match=r"prompt 1, candidate 0 of this step is .*every score must be finite"
    ):
        run_step(algorithm)
    assert all(torch.equal(old, new) for old, new in zip(before, algorithm.parameters, strict=True))


def test_the_pair_order_reaches_the_policy_the_right_way_round(small: Make) -> None:
    """After updates on one batch the margin is positive; with winner and loser exchanged it is negative."""
    config = small("reference.refresh_every=null")
    margins = []
    for swap in (False, True):
        algorithm = make_algorithm(config)
        latents = torch.randn(2, 2, *algorithm.model.latent_shape, generator=torch.Generator().manual_seed(1))
        text = algorithm.model.embed(PROMPTS)
        pairs = pairs_of(latents[:, 0], latents[:, 1], text, [0, 1])
        exchanged = [Pair(winner=pair.loser, loser=pair.winner) for pair in pairs]
        optimizer = torch.optim.SGD(algorithm.parameters, 1e-4)
        for _ in range(3):
            algorithm.objective.backward(exchanged if swap else pairs, algorithm.reference)
            optimizer.step()
            optimizer.zero_grad()
        sums = algorithm.objective.backward(pairs, algorithm.reference)
        margins.append(sums["margin"])
        flipped = algorithm.objective.backward(exchanged, algorithm.reference)
        assert flipped["margin"] == pytest.approx(-sums["margin"], rel=1e-4)
    assert margins[0] > 0 > margins[1]


class Recorder:
    """Stands before a network and keeps what went in and came out."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.calls: list[tuple[tuple[object, ...], dict[str, object], Tensor]] = []

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        out = self.network(*args, **kwargs)
        self.calls.append((args, kwargs, out))
        return out

    def __getattr__(self, name: str) -> object:
        return getattr(self.network, name)


@pytest.mark.parametrize("branch", ["conditional", "guided"])
def test_policy_and_reference_see_identical_batches(small: Make, branch: str) -> None:
    algorithm = make_algorithm(small(f"objective.branch={branch}", "rollout.guidance=3.0"))
    policy, reference = Recorder(algorithm.model.network), Recorder(algorithm.reference)
    algorithm.model.network, algorithm.reference = policy, reference  # type: ignore[assignment]
    algorithm.model.network.train()
    latents = torch.randn(2, 2, *algorithm.model.latent_shape)
    text = algorithm.model.embed(PROMPTS)
    algorithm.objective.backward(pairs_of(latents[0], latents[1], text, [0, 1]), reference)  # type: ignore[arg-type]
    assert len(policy.calls) == len(reference.calls) == 1
    (first, first_named, out), (second, second_named, frozen) = policy.calls[0], reference.calls[0]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one is other
    assert first_named == second_named
    assert torch.equal(out, frozen)
    assert out.requires_grad
    assert not frozen.requires_grad


def test_no_graph_reaches_reward_or_decoder(small: Make) -> None:
    reward = ScriptedReward([0.0, 1.0, 2.0, 0.0])
    algorithm = make_algorithm(small("reward.dimensions=global"), reward)
    result = run_step(algorithm)
    assert not candidates_of(result).requires_grad
    assert all(video.dtype == torch.uint8 for video in reward.seen)
    vae = algorithm.model.vae  # type: ignore[attr-defined]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in vae.parameters())


def test_rows_at_once_change_neither_candidates_nor_gradient(small: Make) -> None:
    whole, cut = small(), small("rollout.batch_size=1", "objective.micro_batch_size=3")
    results = []
    for config in (whole, cut):
        algorithm = make_algorithm(config)
        text = algorithm.model.embed(PROMPTS)
        candidates = sample_candidates(
            algorithm.model, algorithm.model.network, text, [0, 1], config.rollout, 0, torch.device("cpu")
        )
        latents = torch.randn(2, 2, *algorithm.model.latent_shape, generator=torch.Generator().manual_seed(2))
        algorithm.objective.backward(pairs_of(latents[0], latents[1], text, [0, 1]), algorithm.reference)
        results.append((candidates, [p.grad for p in algorithm.parameters if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()  # other batch shapes round otherwise, entry by entry


def test_times_of_several_draws_are_stratified_and_shared_by_the_pair(small: Make) -> None:
    algorithm = make_algorithm(small("objective.timesteps_per_pair=4"))
    times, noise = times_and_noise(algorithm, [5, 6])
    assert len(times) == len(noise) == 8
    ratio = 5**0.5  # the shift by five latent frames at the world's own resolution
    unshifted = times / 1000 / (ratio - (ratio - 1) * times / 1000)
    quarters = torch.special.ndtr(torch.logit(unshifted)).unflatten(0, (2, 4)) * 4
    assert quarters.floor().tolist() == [[0, 1, 2, 3]] * 2
    again, _ = times_and_noise(algorithm, [6])
    assert torch.equal(again, times[4:])


@pytest.mark.parametrize(("weighting", "share"), [("epsilon", 0), ("x0", 1)])
def test_weighting_moves_the_space_in_which_beta_is_constant(small: Make, weighting: str, share: int) -> None:
    margins = {}
    for name in ("prediction", weighting):
        algorithm = make_algorithm(small(f"objective.weighting={name}", "objective.timesteps_per_pair=1"))
        margins[name] = margin_away_from_the_reference(algorithm)["margin"]
        times, _ = times_and_noise(algorithm, [3])
    t = float(times[0]) / 1000
    assert margins[weighting] == pytest.approx(margins["prediction"] * (1 - t, t)[share] ** 2, rel=1e-5)


def test_anchor_and_loser_scaling_reach_the_gradient(small: Make) -> None:
    gradients, losses = [], []
    for setting in ("winner_anchor=0.0", "winner_anchor=2.0", "loser_scaling=1.0"):
        algorithm = make_algorithm(small(f"objective.{setting}"))
        losses.append(margin_away_from_the_reference(algorithm)["loss"])
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.parameters if p.grad is not None]))
    assert losses[1] > losses[0] == losses[2]
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def margin_away_from_the_reference(algorithm: OnlineVPO) -> dict[str, float]:
    """Sums of one pair's step with a policy that is not the reference."""
    with torch.no_grad():
        for parameter in algorithm.parameters:
            parameter.mul_(1.01)
    latents = torch.randn(2, 1, *algorithm.model.latent_shape, generator=torch.Generator().manual_seed(4))
    text = algorithm.model.embed(PROMPTS[:1])
    return algorithm.objective.backward(pairs_of(latents[0], latents[1], text, [3]), algorithm.reference)


def test_candidates_depend_on_the_stream_position_only(small: Make) -> None:
    config = small()
    algorithm = make_algorithm(config)
    text = algorithm.model.embed(PROMPTS)

    def sample(positions: Sequence[int], rows: slice) -> Tensor:
        network = algorithm.model.network
        return sample_candidates(
            algorithm.model, network, text[rows], positions, config.rollout, 0, torch.device("cpu")
        )

    together = sample([7, 8], slice(0, 2))
    torch.testing.assert_close(together[1:], sample([8], slice(1, 2)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(together[:1], sample([9], slice(0, 1)))
    assert not torch.equal(together[0, 0], together[0, 1])


def test_a_policy_without_trainable_parameters_is_refused(small: Make) -> None:
    config = small()
    model = build_model(config, Processes.start("cpu"))
    model.network.requires_grad_(False)
    with pytest.raises(ValueError, match="there is nothing to train"):
        OnlineVPO(
            config,
            model,
            ScriptedReward([1.0]),
            build_reference("copy", model.network),
            Processes.start("cpu"),
        )


def test_a_gradient_that_is_not_finite_stops_before_the_policy_changes(small: Make) -> None:
    algorithm = make_algorithm(small())
    algorithm.parameters[0].register_hook(lambda grad: grad * math.nan)
    before = [parameter.clone() for parameter in algorithm.parameters]
    with pytest.raises(ValueError, match="the gradient norm is nan at optimizer step 1"):
        run_step(algorithm)
    assert all(torch.equal(old, new) for old, new in zip(before, algorithm.parameters, strict=True))


def in_bfloat16(config: Config) -> OnlineVPO:
    """The algorithm over a policy of bfloat16 values and the configured reference, with scripted scores."""
    processes = Processes.start("cpu")
    model = build_model(config, processes)
    model.prepare(PROMPTS)
    reference = build_reference(config.reference.storage, model.network)
    return OnlineVPO(config, model, ScriptedReward([0.0, 1.0, 2.0, 0.0]), reference, processes)


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
@pytest.mark.long
def test_bfloat16_weights_learn_alike_with_a_copied_and_an_exact_8_bit_reference(
    small: Make, weights: str
) -> None:
    overrides = (SHIPPED, f"memory.weights={weights}", "reference.refresh_every=2", "optimizer.lr=1e-4")
    runs = []
    for storage in ("copy", "exact8"):
        config = small(*overrides, f"reference.storage={storage}", "reward.dimensions=global")
        algorithm = in_bfloat16(config)
        before = [parameter.detach().clone() for parameter in algorithm.parameters]
        runs.append([run_step(algorithm, number).metrics for number in range(3)])
        assert all(torch.equal(new.bfloat16().float(), new) for new in algorithm.parameters)
        assert any(not torch.equal(old, new) for old, new in zip(before, algorithm.parameters, strict=True))
    exact = runs[1][2]
    assert 1 <= exact["reference/bytes_per_weight"] <= 1.25
    assert 0 <= exact["reference/outliers"] < 0.04
    assert exact["reference/bytes"] < 0.5 * runs[0][2]["reference/bytes"]
    for metrics in (*runs[0], *runs[1]):
        for name in [name for name in metrics if name.startswith("reference/")]:
            del metrics[name]
    assert runs[0] == runs[1]
    first, second, third = runs[0]
    assert first["margin"] == third["margin"] == 0.0 != second["margin"]
    assert first["grad_norm"] > 0


@pytest.mark.parametrize(("weights", "bits"), [("fp32_master", 32), ("stochastic_rounding", 8)])
@pytest.mark.long
def test_a_captured_state_goes_on_bit_for_bit_in_bfloat16(
    small: Make, tmp_path: Path, weights: str, bits: int
) -> None:
    config = small(
        f"memory.weights={weights}",
        f"memory.optimizer_bits={bits}",
        "reference.storage=exact8",
        "reference.refresh_every=3",
        "optimizer.lr=1e-4",
        "reward.dimensions=global",
    )
    whole, resumed = in_bfloat16(config), in_bfloat16(config)
    for number in range(2):
        run_step(whole, number)
    saved = copy.deepcopy(capture(whole, 2, {}))
    whole.model.save_policy(tmp_path)
    assert restore(resumed, saved["tensors"], saved["state"], tmp_path) == (2, {})
    for number in (2, 3):
        assert run_step(whole, number).metrics == run_step(resumed, number).metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))


@pytest.mark.long
def test_stepping_in_the_backward_pass_is_the_same_run(small: Make) -> None:
    tie, gap = [1.0] * 4, [0.0, 1.0, 2.0, 0.0]
    runs = []
    for early in ("false", "true"):
        config = small(
            f"memory.step_in_backward={early}",
            "optimizer.clip=null",
            "reference.refresh_every=2",
            "reward.dimensions=global",
            "steps=9",
            "optimizer.warmup_steps=4",
        )
        algorithm = make_algorithm(config, ScriptedReward(gap, tie, gap, gap))
        runs.append((algorithm, [run_step(algorithm, number).metrics for number in range(4)]))
    (one, first), (other, second) = runs
    assert first == second
    assert [row["optimizer_steps"] for row in second] == [1, 1, 2, 3]
    assert [row["reference_age"] for row in second] == [1, 1, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
    assert all(parameter.grad is None for parameter in other.parameters)


def test_stepping_in_the_backward_pass_without_pairs_changes_nothing(small: Make) -> None:
    config = small("memory.step_in_backward=true", "optimizer.clip=null", "reward.dimensions=global")
    algorithm = make_algorithm(config, ScriptedReward([1.0] * 4))
    before = [parameter.detach().clone() for parameter in algorithm.parameters]
    metrics = run_step(algorithm).metrics
    assert (metrics["pairs"], metrics["optimizer_steps"]) == (0, 0)
    assert "grad_norm" not in metrics
    assert all(torch.equal(old, new) for old, new in zip(before, algorithm.parameters, strict=True))


def test_stepping_in_the_backward_pass_is_refused_with_several_processes(small: Make) -> None:
    config = small("memory.step_in_backward=true", "optimizer.clip=null")
    model = build_model(config, Processes.start("cpu"))
    two = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="excludes 2 processes: each would step by its own gradients"):
        OnlineVPO(config, model, ScriptedReward([1.0]), build_reference("copy", model.network), two)


def test_learning_rate_warms_up_and_comes_down() -> None:
    settings = OptimizerConfig(lr=1e-4, warmup_steps=4, final_lr=0.2)
    rates = [learning_rate(settings, step, steps=9) / 1e-4 for step in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2])
