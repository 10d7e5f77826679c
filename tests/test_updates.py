"""Several optimizer steps on the pairs of one rollout, and held-out videos with steps of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from step_case import step_on, times_and_noise
from torch import Tensor

from vpo_engine.build import build_held_out, build_model, build_reward
from vpo_engine.config import Config
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.method import Step
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.reference.store import build_reference
from vpo_engine.run_state import capture, restore
from vpo_engine.runs.start import check_same_run

PROMPTS = ("a red circle moving left", "a blue square moving up")
CPU = torch.device("cpu")
Make = Callable[..., Config]


def make(config: Config) -> OnlineVPO:
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    reward = build_reward(config, processes.device)
    return OnlineVPO(config, model, reward, build_reference("copy", model.network), processes)


def step(algorithm: OnlineVPO, number: int = 0) -> Step:
    return step_on(algorithm, PROMPTS, [2 * number, 2 * number + 1])


def weights(algorithm: OnlineVPO) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in algorithm.parameters]


def test_two_updates_are_two_steps_on_the_same_pairs_with_other_draws(
    small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make(small("objective.updates_per_rollout=2", "optimizer.lr=1e-4"))
    noised: list[tuple[Tensor, Tensor, Tensor]] = []
    after: list[list[Tensor]] = []
    add_noise = algorithm.model.add_noise

    def noted(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        noised.append((latents, noise, t))
        after.append(weights(algorithm))
        return add_noise(latents, noise, t)

    monkeypatch.setattr(algorithm.model, "add_noise", noted)
    result = step(algorithm)
    winners, losers, later_winners, later_losers = noised
    for one, other in ((winners, later_winners), (losers, later_losers)):
        assert torch.equal(one[0], other[0])
        assert not (one[2] == other[2]).any()
        assert not (one[1] == other[1]).flatten(1).all(1).any()
    for update, (_, noise, times) in enumerate((winners, later_winners)):
        expected_times, expected_noise = times_and_noise(algorithm, [0, 1], update)
        assert torch.equal(times, expected_times)
        assert torch.equal(noise, expected_noise)
    assert result.metrics["optimizer_steps"] == algorithm.optimizer_steps == 2
    assert result.metrics["margin"] != 0.0  # of the second, by which the policy has left the reference
    # The first of them is the step of a run that makes one, at the rate of a run of as many optimizer steps.
    alone = make(small("optimizer.lr=1e-4"))
    step(alone)
    assert all(torch.equal(one, other) for one, other in zip(after[2], weights(alone), strict=True))


def test_a_process_with_fewer_micro_batches_makes_passes_that_add_nothing(
    small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six samples in micro-batches of four take two passes, and the other process makes three."""
    config = small("objective.timesteps_per_pair=3", "objective.micro_batch_size=4")
    alone, behind = make(config), make(config)
    metrics = step(alone).metrics
    add_noise, sizes = behind.model.add_noise, []

    def noted(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(latents))
        return add_noise(latents, noise, t)

    monkeypatch.setattr(behind.model, "add_noise", noted)
    monkeypatch.setattr(PolicyOptimizer, "in_lockstep", True)
    monkeypatch.setattr(Processes, "largest", lambda _, number: max(number, 3))
    assert step(behind).metrics == metrics
    assert sizes == [4, 4, 2, 2, 1, 1]  # winners and losers, three times
    assert all(torch.equal(one, other) for one, other in zip(weights(alone), weights(behind), strict=True))


def test_the_reference_is_refreshed_between_the_updates_of_a_step(small: Make) -> None:
    algorithm = make(
        small("objective.updates_per_rollout=2", "reference.refresh_every=3", "optimizer.lr=1e-4")
    )
    assert [step(algorithm, number).metrics["reference_age"] for number in range(3)] == [2, 1, 0]


@pytest.mark.long
def test_the_learning_rate_falls_over_all_updates(small: Make, small_policy: str) -> None:
    rates_of = ("objective.updates_per_rollout=3", "optimizer.lr=1e-4", "optimizer.final_lr=0.5")
    algorithm = make(small(small_policy, "steps=2", *rates_of))
    rates = [step(algorithm, number).metrics["lr"] for number in range(2)]
    assert rates == [pytest.approx(0.8e-4), pytest.approx(0.5e-4)]


@pytest.mark.long
def test_runs_with_several_updates_resume_bit_for_bit(small: Make, small_policy: str, tmp_path: Path) -> None:
    config = small(small_policy, "objective.updates_per_rollout=2", "optimizer.lr=1e-4")
    whole, resumed = make(config), make(config)
    step(whole, 0)
    saved = copy.deepcopy(capture(whole, 1, {}))
    whole.model.save_policy(tmp_path)
    restore(resumed, saved["tensors"], saved["state"], tmp_path)
    assert step(whole, 1).metrics == step(resumed, 1).metrics
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(resumed), strict=True))


def test_held_out_videos_can_have_more_steps_than_the_rollout(small: Make, tmp_path: Path) -> None:
    found = []
    for overrides in (["evaluation.steps=3"], ["rollout.steps=3"], []):
        config = small(*overrides)
        model = build_model(config, Processes.start("cpu"), lambda _: None)
        model.prepare(PROMPTS)
        held_out = build_held_out(config, model, PROMPTS, build_reward(config, CPU), Processes.start("cpu"))
        found.append(held_out.videos(model.network, [0, 1]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(small("evaluation.steps=3")), encoding="utf-8")
    check_same_run(load_config(saved), saved)
    with pytest.raises(ValueError, match=r"evaluation\.steps: 3 -> 2"):
        check_same_run(small(), saved)
