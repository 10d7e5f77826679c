"""A run learns what its reward asks for; with the reward turned around it learns the opposite."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
from toy import ToyReward

SETTINGS = (
    "steps=25",
    "pairs_per_step=6",
    "rollout.candidates=4",
    "reward.dimensions=visual_quality",
    "reference.refresh_every=5",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=0",
    "checkpoint.every=null",
    "evaluation.samples_per_prompt=8",
    "pairs.dataset=none",
)


@pytest.mark.parametrize(
    ("power", "sequential"),
    [
        (1.0, "false"),
        (-1.0, "true"),
        pytest.param(-1.0, "false", marks=pytest.mark.long),
        pytest.param(1.0, "true", marks=pytest.mark.long),
    ],
)
def test_the_policy_learns_what_the_reward_likes(tmp_path: Path, power: float, sequential: str) -> None:
    config = engine.make_config(tmp_path, *SETTINGS, f"memory.sequential={sequential}")
    engine.train(config, ToyReward(power))
    name = "held_out/reward/visual_quality"
    first, last = [row[name] for row in engine.metrics_of(tmp_path / "run", "eval")]
    assert last - first > 0.05, "held-out videos must get better by the reward that trains"
    rows = engine.metrics_of(tmp_path / "run")
    moved = [row["margin"] for row in rows if row["reference_age"] not in (1, 0)]
    assert sum(moved) / len(moved) > 0, (
        "the policy must prefer winners to losers, more than the reference does"
    )
    measured = engine.summary_of(tmp_path / "run")["reward/visual_quality"]
    assert (measured["before"], measured["after"]) == pytest.approx((first, last))
    assert measured["difference"] == pytest.approx(last - first)
    shown = engine.held_out_gallery(tmp_path / "run")
    before, after = (clips[..., 0].float().mean() for clips in (shown.before, shown.after))
    assert (after > before) == (power > 0)
