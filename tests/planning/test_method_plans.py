"""Plans of methods that follow the reward's gradient: the traced step is the real one, and what it holds."""

from __future__ import annotations

import functools

import pytest
from real_trace import assert_traced_as_real

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.planning.estimate import PhasePlan, Plan, estimate
from vpo_engine.planning.exchanged import exchanged
from vpo_engine.planning.fit import fitting_changes
from vpo_engine.planning.gpus import GIB, GPUS
from vpo_engine.planning.report import whole
from vpo_engine.planning.trace import PhaseName, Trace, trace_step

REFL = ("method=refl", "refl.steps=2", "refl.last_steps=1")
VADER = ("method=vader", "vader.steps=2", "vader.guidance=1")


@functools.cache
def traced(*settings: str) -> Trace:
    """Return the trace of a step of a network with one block in each list of blocks."""
    return trace_step(load_config(None, settings), on_gpu=False, depth=1)


@pytest.mark.parametrize("settings", [REFL, (*VADER, "vader.last_steps=1")], ids=["refl", "vader"])
def test_a_traced_step_holds_and_computes_what_a_real_one_does(settings: tuple[str, ...]) -> None:
    config = load_config(None, [*settings, "pairs_per_step=2", "objective.micro_batch_size=1"])
    assert_traced_as_real(config, depth=2)


def test_the_graph_of_the_decoder_and_the_reward_is_in_the_update() -> None:
    """There is neither a reference nor a decoding of its own; what the update holds grows with the videos at once."""
    one, four = (traced(*REFL, "pairs_per_step=4", f"objective.micro_batch_size={size}") for size in (1, 4))
    assert one.names == four.names
    assert set(one.names) == {"text", "rollout", "update", "optimizer"}
    assert "reference" not in one.peak("update")
    held = [trace.peak("update")["activations"] for trace in (one, four)]
    assert 2 < held[1] / held[0] < 4.5
    assert held[0] > 2 * one.peak("rollout")["activations"]


def test_more_steps_with_a_graph_take_more_and_a_random_number_is_planned_as_all() -> None:
    few, all_of_them, drawn = (
        traced(*VADER, "pairs_per_step=1", setting)
        for setting in ("vader.last_steps=1", "vader.last_steps=2", "vader.random_steps=true")
    )
    assert few.flops("update") < all_of_them.flops("update")
    assert drawn.flops("update") == all_of_them.flops("update")
    assert drawn.peak("update") == all_of_them.peak("update")


def test_stored_pairs_are_planned_without_a_rollout() -> None:
    found = traced("method=offline_dpo", "offline_dpo.dataset=runs/a")
    assert found.names == ("text", "update", "optimizer", "refresh")


def test_idle_parts_are_those_that_the_gradient_does_not_need() -> None:
    """The VAE and the reward stay during the update; the optimizer waits on the host."""
    config = load_config(None, [*REFL, "memory.offload_idle=true", "objective.micro_batch_size=1"])
    trace = traced(*REFL, "pairs_per_step=4", "objective.micro_batch_size=1")
    plan = estimate(config, trace, GPUS["a100-80g"], 2**40, "a test")
    phases = {phase.name: phase.bytes for phase in plan.phases}
    assert "vae" in phases["update"]
    assert "optimizer" not in phases["update"]
    assert "vae" not in phases["optimizer"]


@pytest.mark.parametrize(
    ("name", "sampled"), [("objective.micro_batch_size", 4), ("memory.decode_frames", 1)]
)
def test_what_makes_a_gradient_fit_is_proposed(name: str, sampled: int) -> None:
    """The decoder's graph is in the update, and videos that go through it at once are sampled at once."""
    section, key = name.split(".")

    def planner(changed: Config) -> Plan:
        done = getattr(getattr(changed, section), key) == 1
        sizes: dict[PhaseName, int] = {"rollout": 1 if done else sampled, "update": 1 if done else 4}
        phases = tuple(
            PhasePlan(phase, {"activations": size * GIB}, 0, 0.0, None) for phase, size in sizes.items()
        )
        return Plan(phases, 2 * GIB, "a test", GPUS["a100-80g"], ())

    config = load_config(None, REFL)
    assert [str(change) for change in fitting_changes(config, planner(config), planner)] == [f"{name}=1"]


def test_a_judge_that_waits_on_the_host_is_proposed_where_that_suffices() -> None:
    def planner(changed: Config) -> Plan:
        judge = 0 if changed.memory.offload_idle else 4 * GIB
        phase = PhasePlan("update", {"weights": GIB, "judge": judge}, 0, 0.0, None)
        return Plan((phase,), 2 * GIB, "a test", GPUS["a100-80g"], ())

    config = load_config(None, ["guards.reward.kind=hpsv2", "guards.reward.path=h"])
    found = [str(change) for change in fitting_changes(config, planner(config), planner)]
    assert found == ["memory.offload_idle=true"]


def test_pairs_that_are_sampled_once_take_no_time_of_every_step() -> None:
    words = ("method=offline_dpo", "offline_dpo.pairs=2", "pairs_per_step=2", "steps=1000")
    plan = estimate(load_config(None, words), traced(*words), GPUS["a100-80g"], 2**40, "a test")
    seconds = {phase.name: phase.seconds or 0.0 for phase in plan.phases}
    learning = sum(seconds[name] for name in ("update", "optimizer", "refresh"))
    assert plan.seconds == pytest.approx(learning)
    assert "pairs are sampled once" in whole(plan)


def test_micro_batches_of_a_gradient_cost_what_the_whole_does() -> None:
    one, four = (traced(*REFL, "pairs_per_step=4", f"objective.micro_batch_size={size}") for size in (1, 4))
    for name in ("rollout", "update"):
        assert one.flops(name) == pytest.approx(four.flops(name), rel=0.02), name


def test_pairs_that_are_sampled_once_are_exchanged_in_no_step() -> None:
    found = exchanged(load_config(None, ["method=offline_dpo"]))
    assert (found.sampled, found.guided, found.predicted) == (0, 0, 0)
