"""Every random number of a run is drawn for one purpose: rollout, training and evaluation share none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import engine
import pytest
import torch
from torch import Tensor

from vpo_engine.data.prompts import PromptStream
from vpo_engine.seeding import generator, integer

SETTINGS = (
    "steps=2",
    "objective.updates_per_rollout=2",
    "objective.timesteps_per_pair=2",
    "pairs.resample=2",
    "rollout.candidates=2",
    "evaluation.every=1",
)
SHARED = 4
"""Numbers of 24 that two noises may have in common by chance: float32 has few normal numbers near zero."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> engine.Recording:
    return engine.train(engine.make_config(tmp_path_factory.mktemp("randomness"), *SETTINGS))


def noises_of(run: engine.Recording) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Noise of the candidates, of the held-out videos and of the training."""
    starts = [latents.unbind(0) for _, _, _, latents in run.sampled]
    held_out = [*starts[0]]
    rollout = [noise for group in starts for noise in group if not any(noise.equal(one) for one in held_out)]
    return rollout, held_out, [row.noise for row in run.rows]


def most_shared(noises: Sequence[Tensor]) -> int:
    """The largest number of values, signs apart, that two of the noises have in common."""
    owners: dict[float, set[int]] = defaultdict(set)
    for number, noise in enumerate(noises):
        for value in noise.abs().flatten().tolist():
            owners[value].add(number)
    shared = Counter(pair for group in owners.values() for pair in combinations(sorted(group), 2))
    return max(shared.values(), default=0)


def test_no_noise_is_used_twice(run: engine.Recording) -> None:
    rollout, held_out, training = noises_of(run)
    assert len(held_out) == 4
    assert len(rollout) >= 2 * 4 * 2
    assert len(training) >= 2 * 2 * 2 * 2
    assert most_shared([*rollout, *held_out, *training]) < SHARED


def test_no_time_is_used_twice(run: engine.Recording) -> None:
    times = [row.time for row in run.rows]
    assert len(set(times)) == len(times)


def test_held_out_noise_is_the_same_in_every_evaluation(run: engine.Recording) -> None:
    _, held_out, _ = noises_of(run)
    groups = [latents for _, _, _, latents in run.sampled if len(latents) == len(held_out)]
    same = [group for group in groups if all(map(lambda a, b: a.equal(b), group, held_out))]
    assert len(same) >= 3  # before, after the first step, and at the end


def test_another_seed_has_other_noise(run: engine.Recording, tmp_path: Path) -> None:
    other = engine.train(engine.make_config(tmp_path, *SETTINGS, "seed=1"))
    both = [noise for one in (run, other) for kind in noises_of(one) for noise in kind]
    assert most_shared(both) < SHARED


def test_noise_depends_on_the_position_and_not_on_the_batch(run: engine.Recording, tmp_path: Path) -> None:
    """Two prompts a step for twice as many steps: the same positions, hence the same noise, but the pairs' order."""
    settings = (
        *SETTINGS,
        "steps=4",
        "pairs_per_step=2",
        "rollout.batch_size=1",
        "reference.refresh_every=null",
    )
    other = engine.train(engine.make_config(tmp_path, *settings))
    rollout, _, _ = noises_of(run)
    rollout_again, _, _ = noises_of(other)
    first = {tuple(noise.flatten().tolist()) for noise in rollout}
    again = {tuple(noise.flatten().tolist()) for noise in rollout_again}
    # Which prompts need more candidates depends on the policy; the first candidates of all positions are the same.
    assert len(first & again) >= 2 * 4 * 2


@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_a_time_is_never_the_end_of_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: float
) -> None:
    """A uniform number can be 0, or be rounded to 1, and there the normal number of the same rank is infinite."""
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), drawn))
    rows = engine.train(
        engine.make_config(tmp_path, *SETTINGS, "steps=1", "objective.timesteps_per_pair=1")
    ).rows
    assert rows
    assert all(0 < row.time < 1000 for row in rows)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_integer_below_the_count_is_drawn_about_equally_often(count: int) -> None:
    """Of 300 draws for each, five standard deviations are less than 90; the draws are always the same."""
    drawn = Counter(integer(count, 5, "place", number) for number in range(300 * count))
    assert sorted(drawn) == list(range(count))
    assert all(abs(times - 300) < 90 for times in drawn.values())


def test_each_purpose_and_position_has_a_seed_of_its_own() -> None:
    """Of 60,000 seeds of 63 bits two are equal by chance once in 5e9 times."""
    purposes = ("rollout", "time", "noise", "held-out")
    seeds = [generator(0, purpose, place).initial_seed() for purpose in purposes for place in range(15_000)]
    assert len(set(seeds)) == len(seeds)
    assert generator(7, "noise", 3, 1).initial_seed() == 4946945047529232929


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_orders_the_prompts_and_stands_beside_the_pairs(tmp_path: Path, seed: int) -> None:
    engine.train(engine.make_config(tmp_path, "steps=1", f"seed={seed}"))
    lines = engine.lines_of(tmp_path / "run")
    expected = PromptStream(engine.PROMPTS, seed).take(0, 4)
    assert [line.prompt for line in lines] == [one.text for one in expected]
    assert {line.seed for line in lines} == {seed}
    assert engine.state_of(tmp_path / "run", 1)["seed"] == seed
