"""Test the planned cost of a sampling loop: steps, branches, pruned candidates, and text that is projected once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.assets import FLOW, GEOMETRY, load_policy
from vpo_engine.memory.quantised_base import block_linears
from vpo_engine.planning.trace import Trace, trace_step
from vpo_engine.planning.tracker import BLOCK
from vpo_engine.protocols import SamplerSettings


def rollout(*overrides: str, network_only: bool = True, depth: int | None = 1) -> Trace:
    """Return the trace of a step; the network has one block in each list, because what is said here holds for any."""
    config = load_config(
        None, ["pairs_per_step=1", "objective.timesteps_per_pair=1", "rollout.steps=6", *overrides]
    )
    return trace_step(config, on_gpu=False, network_only=network_only, depth=depth)


@pytest.fixture(scope="module")
def plain() -> tuple[float, float]:
    """Operations of what a loop computes once, and of a step, without guidance."""
    six, five = (rollout(f"rollout.steps={steps}").flops("rollout") for steps in (6, 5))
    return six - 6 * (six - five), six - five


def test_guidance_doubles_the_steps_in_its_interval(plain: tuple[float, float]):
    once, step = plain
    times = FLOW.sampling_timesteps(6, GEOMETRY.height, GEOMETRY.width, GEOMETRY.num_frames)[0]
    settings = SamplerSettings(6, 7.0, (0.3, 0.8))
    guided = sum(settings.guided_at(time / FLOW.num_timesteps) for time in times.tolist())
    assert 0 < guided < 6
    always = rollout("rollout.guidance=7.0").flops("rollout")
    sometimes = rollout("rollout.guidance=7.0", "rollout.guidance_interval=[0.3, 0.8]").flops("rollout")
    assert always == 2 * (once + 6 * step)
    assert sometimes == 2 * once + once + (6 + guided) * step


@pytest.mark.long
def test_candidates_that_are_given_up_cost_their_first_steps_and_a_preview():
    pruned = rollout("rollout.candidates=4", "rollout.prune={after: 0.5, keep: 2}", network_only=False)
    begun = rollout("rollout.candidates=4", "rollout.steps=3", network_only=False)
    finished = rollout("rollout.candidates=2", "rollout.steps=3")
    assert pruned.flops("rollout") == begun.flops("rollout") + finished.flops("rollout")
    assert pruned.flops("decode") == begun.flops("decode") * (4 + 2) / 4


@pytest.mark.long
def test_exploring_costs_all_candidates_cheaply_and_two_exactly():
    found = rollout("rollout.candidates=4", "rollout.explore={steps: 2}", network_only=False)
    cheap = rollout("rollout.candidates=4", "rollout.steps=2", network_only=False)
    exact = rollout("rollout.candidates=2", network_only=False)
    assert found.flops("rollout") == cheap.flops("rollout") + exact.flops("rollout")
    assert found.flops("decode") == cheap.flops("decode") + exact.flops("decode")


@pytest.mark.long
def test_a_copy_in_8_bits_takes_a_byte_for_each_weight_of_the_blocks():
    found, plain = rollout("rollout.weights=int8", depth=None), rollout(depth=None)
    weights = [linear.weight for linear in block_linears(load_policy()).values()]
    parts = [size for weight in weights for size in (weight.numel(), 4 * len(weight))]
    assert found.peak("rollout")["sampling copy"] == sum(-(-part // BLOCK) * BLOCK for part in parts)
    assert found.flops("rollout") == plain.flops("rollout")


def test_a_step_cache_is_planned_as_if_it_never_served(plain: tuple[float, float]):
    once, step = plain
    assert rollout("rollout.cache=0.1").flops("rollout") == once + 6 * step


@pytest.mark.long
def test_groups_of_rows_cost_the_same_and_take_less():
    all_at_once, in_groups = rollout("pairs_per_step=4"), rollout("pairs_per_step=4", "rollout.batch_size=4")
    assert in_groups.flops("rollout") == all_at_once.flops("rollout")
    assert sum(in_groups.peak("rollout").values()) < sum(all_at_once.peak("rollout").values())


@pytest.mark.long
def test_steps_that_are_not_traced_count_as_if_they_were(monkeypatch):
    short = rollout("rollout.guidance=7.0", "rollout.steps=4")
    monkeypatch.setattr("vpo_engine.planning.trace.repeated", lambda *_: nullcontext())
    traced = rollout("rollout.guidance=7.0", "rollout.steps=4")
    for name in traced.names:
        assert short.peak(name) == traced.peak(name), name
        assert short.flops(name) == traced.flops(name), name
        assert short.traffic(name) == traced.traffic(name), name
