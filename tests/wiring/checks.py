"""Compare the files of a run of the toy model with what ``oracle`` computes for the same settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import engine
import oracle
import pytest
import torch
from torch import Tensor

from vpo_engine.config import Config

CASES: dict[str, tuple[str, ...]] = {
    "plain": ("steps=3",),
    "draws, updates and weights": (
        "steps=5",
        "objective.timesteps_per_pair=3",
        "objective.updates_per_rollout=2",
        "pairs.gap_power=1.5",
        "optimizer.weight_decay=0.1",
        "optimizer.clip=0.05",
        "optimizer.betas=[0.8, 0.95]",
    ),
    "micro-batches": (
        "objective.timesteps_per_pair=2",
        "objective.micro_batch_size=3",
        "rollout.batch_size=2",
        "pairs.gap_power=1",
        "pairs.min_gap=0.01",
        "reward.dimensions=[visual_quality, text_alignment]",
        "reward.normalise=group",
    ),
    "one member at a time": (
        "memory.sequential=true",
        "objective.micro_batch_size=3",
        "objective.timesteps_per_pair=2",
        "objective.weighting=epsilon",
        "objective.winner_anchor=0.3",
        "pairs.gap_power=1",
        "rollout.overlap=true",
        "rollout.batch_size=4",
        "reference.storage=bf16",
        "reference.refresh_every=2",
    ),
    "more candidates for ties": (
        "pairs.resample=2",
        "pairs.rule=pareto",
        "pairs.gap_power=0.5",
        "objective.weighting=x0",
        "rollout.candidates=2",
        "rollout.overlap=true",
        "rollout.batch_size=3",
        "reference.refresh_every=2",
    ),
    "pruned and guided": (
        "rollout.overlap=true",
        "rollout.batch_size=7",
        "rollout.candidates=6",
        "rollout.prune.after=0.5",
        "rollout.prune.keep=3",
        "rollout.guidance=2.5",
        "rollout.guidance_interval=[0.25, 0.75]",
        "objective.branch=guided",
        "reward.normalise=group",
        "pairs.resample=1",
        "guards.motion_floor=55",
    ),
    "pruned by the first frames": (
        "rollout.candidates=4",
        "rollout.prune={after: 0.5, keep: 2, frames: 2}",
        "rollout.batch_size=3",
    ),
    "explored": (
        "rollout.candidates=5",
        "rollout.explore.steps=2",
        "rollout.explore.cache=0.3",
        "rollout.explore.guidance_interval=[0.6, 1.0]",
        "rollout.guidance=2.0",
        "rollout.guidance_interval=[0.1, 0.9]",
        "rollout.cache=0.1",
        "pairs.resample=1",
        "reference.refresh_every=null",
    ),
    "still candidates never win": (
        "guards.motion_floor=50",
        "pairs.rule=pareto",
        "rollout.candidates=4",
        "pairs.resample=1",
    ),
    "no worse in two dimensions of three": (
        "steps=3",
        "pairs.rule=pareto",
        "reward.dimensions=[visual_quality, text_alignment]",
        "rollout.candidates=4",
        "pairs.gap_power=1",
    ),
    "one pair a step": (
        "steps=11",
        "pairs_per_step=1",
        "objective.updates_per_rollout=2",
        "reference.refresh_every=3",
        "pairs.gap_power=1",
    ),
    "draws split over a team": (
        "rollout.candidates=4",
        "rollout.prune.after=0.5",
        "rollout.prune.keep=2",
        "objective.timesteps_per_pair=3",
        "objective.updates_per_rollout=2",
        "pairs.gap_power=1",
        "pairs.resample=1",
    ),
    "from the reference": (
        "rollout.source=reference",
        "reference.refresh_every=4",
        "objective.updates_per_rollout=2",
        "objective.loser_scaling=0.3",
    ),
}
CLOSE = {"rtol": 2e-3, "atol": 2e-5}
"""Float32 against float64 over a few optimizer steps."""


@functools.cache
def expected_of(case: str) -> oracle.Run:
    return oracle.Oracle(config_of(case), engine.PROMPTS).run()


def config_of(case: str) -> Config:
    return engine.load_config(None, [*engine.SETTINGS, *CASES[case]])


def check_lines(case: str, run: Path) -> None:
    found, expected = engine.lines_of(run), expected_of(case).lines
    assert [(one.step, one.position) for one in found] == [(one.step, one.position) for one in expected]
    for one, other in zip(found, expected, strict=True):
        where = (case, one.position)
        assert one.prompt == other.prompt, where
        assert one.seed == 0
        assert list(one.candidates) == [candidate.number for candidate in other.candidates], where
        assert (one.winner, one.loser, one.kept) == (other.winner.number, other.loser.number, other.kept), (
            where
        )
        for name, scores in one.scores.items():
            if name != "motion":
                wanted = [candidate.scores[name] for candidate in other.candidates]
                assert list(scores) == pytest.approx(wanted, rel=1e-3, abs=1e-3), where
        assert list(one.selected) == pytest.approx(other.selected, rel=1e-2, abs=1e-3), where
        assert one.gap == pytest.approx(other.gap, rel=2e-2, abs=1e-3), where
        assert one.weight == pytest.approx(other.weight, rel=2e-2, abs=1e-3), where
        if one.kept:
            for stored, wanted in zip(one.latents(), (other.winner, other.loser), strict=True):
                torch.testing.assert_close(stored.double(), wanted.latents, **CLOSE)
        else:
            assert (one.weight, one.row) == (0.0, None)


def check_rows(found: Sequence[engine.Row], expected: Sequence[oracle.LossRow]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.noise, other.noise)
        assert one.time == pytest.approx(other.time, rel=1e-6)
        torch.testing.assert_close(one.caption.double(), other.caption, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.winner.double(), other.winner, **CLOSE)
        torch.testing.assert_close(one.loser.double(), other.loser, **CLOSE)
        assert one.weight == pytest.approx(other.weight, rel=2e-2, abs=1e-3)


def check_policies(case: str, run: Path) -> None:
    expected = expected_of(case)
    start = oracle.ToyNetwork().state_dict()
    for number, (policy, reference) in enumerate(
        zip(expected.policies, expected.references, strict=True), start=1
    ):
        where = f"{case}, step {number}"
        assert_moved_alike(engine.policy_of(run, number), policy, start, where)
        stored = engine.reference_of(run, number)
        for name, value in reference.items():
            off = (stored[name].double() - value).norm()
            assert off <= 1e-3 * value.norm(), (where, name)
        assert engine.state_of(run, number)["refreshed_at"] == expected.refreshed_at[number - 1]
        assert engine.state_of(run, number)["prompt_cursor"] == number * config_of(case).pairs_per_step


def assert_moved_alike(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], where: str
) -> None:
    """The way from the start is the same, but for a few entries whose gradient is rounding alone."""
    one = torch.cat([(found[name] - start[name]).flatten() for name in start]).double()
    other = torch.cat([(expected[name] - start[name]).flatten() for name in start])
    assert (one - other).norm() <= 2e-2 * other.norm(), where


def check_metrics(case: str, run: Path) -> None:
    rows = engine.metrics_of(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for row, wanted in zip(rows, expected_of(case).metrics, strict=True):
        for name, value in wanted.items():
            tolerance = {"rel": 1e-9, "abs": 1e-12} if name in EXACT else {"rel": 2e-2, "abs": 1e-3}
            assert row[name] == pytest.approx(value, **tolerance), (case, row["step"], name)
        refreshed = "implicit_accuracy" not in wanted
        assert ("implicit_accuracy" not in row) == refreshed, (case, row["step"], "after a refresh")


EXACT = ("pairs", "lr", "optimizer_steps", "reference_age", "tie_rate", "tie_rate_before_resample")
