"""Guidance in an interval, and blocks that are not computed again: what each computes, and that off is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rollout_case import STEPS, Counting, batched, noise_of, sampled, schedule, settings, sprites

from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.models.step_cache import BlockCache
from vpo_engine.protocols import SamplerSettings

TIMES = [time / 1000 for time, _ in schedule(STEPS)]


# --- Guidance interval ---


def test_an_interval_over_all_times_changes_no_bit() -> None:
    assert torch.equal(sampled(settings(guidance_interval=(0.0, 1.0))), sampled(settings()))


def test_guidance_applies_within_the_interval_only() -> None:
    inside = (TIMES[2] - 0.01, TIMES[1] + 0.01)
    network = Counting(sprites()[0].network)
    config = settings(guidance_interval=inside)
    found = sampled(config, network)
    assert network.rows == [8, 16, 16, 8]
    by_hand = batched(
        noise_of(config), lambda t: 3.0 if inside[0] <= t / 1000 <= inside[1] else 1.0, schedule(STEPS)
    )
    assert torch.equal(found, by_hand)
    assert not torch.equal(found, sampled(settings()))


def test_both_ends_of_the_interval_belong_to_it() -> None:
    exact = SamplerSettings(1, 7.0, (0.25, 0.75))
    assert [exact.guided_at(t) for t in (0.2499, 0.25, 0.5, 0.75, 0.7501)] == [False, True, True, True, False]
    assert SamplerSettings(1, 7.0, (0.5, 1.0)).guided_at(1.0000001)
    assert SamplerSettings(1, 7.0).guided_at(1.0000001)


def test_either_number_of_branches_projects_its_text_once() -> None:
    model, text = sprites()
    tokens = int(text.mask.sum())
    seen: list[int] = []
    keys = model.network.temporal_blocks[1].cross_attn.kv_linear
    handle = keys.register_forward_hook(lambda _module, given, _out: seen.append(len(given[0])))
    sampled(settings(guidance_interval=(TIMES[2], TIMES[1])))
    handle.remove()
    assert seen == [tokens, 2 * tokens]


# --- Step cache ---


@contextmanager
def counted_blocks() -> Iterator[list[int]]:
    """Calls of each pair's spatial block."""
    blocks = sprites()[0].network.spatial_blocks
    calls = [0] * len(blocks)

    def count(number: int) -> None:
        calls[number] += 1

    handles = [
        block.register_forward_hook(lambda *_, number=number: count(number))
        for number, block in enumerate(blocks)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_a_threshold_below_every_change_changes_nothing_but_rounding() -> None:
    with counted_blocks() as calls:
        found = sampled(settings(cache=1e-9))
    assert calls == [STEPS] * len(calls)
    assert torch.equal(found, sampled(settings()))


def test_a_threshold_above_every_change_computes_the_later_blocks_once() -> None:
    with counted_blocks() as calls:
        found = sampled(settings(cache=1e9, steps=6))
    assert calls == [6, *[1] * (len(calls) - 1)]
    assert torch.equal(found, sampled(settings(cache=1e9, steps=6)))
    assert not torch.equal(found, sampled(settings(steps=6)))


def test_a_reused_step_adds_what_the_last_computed_one_added() -> None:
    cache = BlockCache(0.1)
    ones, rest = torch.ones(2, 3), torch.full((2, 3), 5.0)
    assert cache.after_first(ones) is None
    cache.keep(rest)
    assert cache.after_first(ones * 1.09) is rest
    # One sample beyond the threshold is enough; the comparison is with the last computed step.
    assert cache.after_first(torch.stack([ones[0], ones[0] * 1.11])) is None
    cache.keep(rest + 1)
    kept = cache.after_first(torch.stack([ones[0], ones[0] * 1.11]))
    assert kept is not None
    assert torch.equal(kept, rest + 1)
    assert (cache.computed, cache.reused) == (2, 2)


def test_values_that_are_not_finite_are_never_near() -> None:
    cache = BlockCache(1e9)
    cache.after_first(torch.ones(1, 3))
    cache.keep(torch.ones(1, 3))
    assert cache.after_first(torch.full((1, 3), torch.nan)) is None


# --- Settings ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.guidance_interval=[0.2,0.8]"], "a guidance that guidance=1.0 turns off"),
        (["rollout.guidance=3", "rollout.guidance_interval=[0.8,0.2]"], "0 <= low < high <= 1"),
        (["rollout.guidance=3", "rollout.guidance_interval=[0.0,1.5]"], "0 <= low < high <= 1"),
        (["rollout.guidance=3", "rollout.guidance_interval=[.nan,1.0]"], "must be a finite number"),
        (["rollout.cache=0"], "rollout.cache=0 must be above 0"),
        (["rollout.cache=.inf"], "rollout.cache=.inf must be a finite number"),
        (["rollout.prune={after: 0.5, keep: 4}"], "prune.keep=4 must be below candidates=4"),
        (["rollout.prune={after: 0.5, keep: 1}"], "rollout.prune.keep=1 must be at least 2"),
        (["rollout.prune={after: 1.0, keep: 2}"], "rollout.prune.after=1.0 must be below 1"),
        (["rollout.prune={after: 0.04, keep: 2}"], "prune.after=0.04 is 0 of steps=12"),
        (["rollout.prune={after: 0.96, keep: 2}"], "prune.after=0.96 is 12 of steps=12"),
    ],
)
def test_nonsense_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="rollout") as refused:
        load_config(None, overrides)
    assert message in str(refused.value)


def test_everything_is_exact_unless_asked_for() -> None:
    rollout = load_config(None).rollout
    assert (rollout.guidance_interval, rollout.prune, rollout.cache) == (None, None, None)


def test_slices_count_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four values, three are here and have not changed; the one of the other process has doubled."""
    cache = BlockCache(0.3, SequenceGroup(Processes(0, 2, torch.device("cpu"))))
    monkeypatch.setattr(SequenceGroup, "sum", lambda self, values: values + torch.ones(2, 1))
    first = torch.ones(1, 3)
    assert cache.after_first(first) is None
    cache.keep(first)
    assert cache.after_first(first) is first
