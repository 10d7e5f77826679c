"""Test which faults stop a run, and which make no difference to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from torch import Tensor
from toy import ToyReward

from vpo_engine.config import Config
from vpo_engine.runs.lock import RunLock


class BrokenReward(ToyReward):
    """One score of the given value, after ``count`` videos."""

    def __init__(self, value: float, count: int) -> None:
        super().__init__()
        self.value, self.count = value, count

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = super().score(videos, prompts)
        if len(self.seen) > self.count:
            found["visual_quality"][-1] = self.value
        return found


SCORED_FIRST = 14
"""Videos of the first evaluation: its 4 clips, one of them twice again, and all with their own and another prompt."""
PRUNED = ("rollout.candidates=4", "rollout.prune.after=0.5", "rollout.prune.keep=2")


@pytest.mark.parametrize("settings", [(), PRUNED], ids=["finished", "previews"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_ends_the_run(
    tmp_path: Path, value: float, settings: tuple[str, ...]
) -> None:
    config = engine.make_config(tmp_path, *settings)
    where = " on its preview" if settings else ""
    with pytest.raises(ValueError, match=rf"of this step is (nan|-?inf){where}; every score must be finite"):
        engine.train(config, BrokenReward(value, SCORED_FIRST + 4))
    assert not engine.metrics_of(tmp_path / "run")
    assert not (tmp_path / "run" / "preference_dataset" / "pairs_0000.jsonl").exists()


CHANGED = (
    "seed=3",
    "pairs_per_step=2",
    "rollout.candidates=4",
    "reward.normalise=group",
    "pairs.gap_power=1",
    "objective.beta=21",
    "reference.refresh_every=2",
    "optimizer.lr=1e-3",
    "memory.sequential=true",
    "guards.motion_floor=1",
    "ema.decay=0.9",
    "evaluation.steps=7",
)


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path, "steps=3"))
    saved = engine.saved_tensors(tmp_path / "run", 3)
    for changed in CHANGED:
        config = engine.make_config(tmp_path, "steps=4", changed, "checkpoint.resume=true")
        with pytest.raises(ValueError, match="holds a run with other settings"):
            engine.train(config)
    assert len(engine.metrics_of(tmp_path / "run")) == 3
    assert all(map(torch.equal, saved.values(), engine.saved_tensors(tmp_path / "run", 3).values()))


def run(folder: Path, *settings: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The log, without what the reference takes, and the policy at the end."""
    common = ("steps=5", "objective.updates_per_rollout=2", "reference.refresh_every=3", "optimizer.lr=1e-2")
    engine.train(engine.make_config(folder, *common, *settings))
    rows = [
        {name: value for name, value in row.items() if not name.startswith("reference/")}
        for row in engine.metrics_of(folder / "run")
    ]
    return rows, engine.policy_of(folder / "run", 5)


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
def test_exact_storages_of_the_reference_make_no_difference(tmp_path: Path, weights: str) -> None:
    """Of bfloat16 weights a copy, bf16 and exact8 hold the same reference, before and after it is refreshed."""
    storages = ("copy", "bf16", "exact8")
    runs = [
        run(tmp_path / name, f"reference.storage={name}", f"memory.weights={weights}") for name in storages
    ]
    for rows, policy in runs[1:]:
        assert rows == runs[0][0]
        assert all(torch.equal(value, runs[0][1][name]) for name, value in policy.items())
    margins = {row["optimizer_steps"]: row["margin"] for row in runs[0][0]}
    assert margins[4] == 0.0  # the second update of step 2 is the first after the refresh at 3
    assert margins[6] != 0.0


def test_where_the_reward_is_the_same_for_all_nothing_is_learned(tmp_path: Path) -> None:
    config = engine.make_config(tmp_path, "steps=3")
    engine.train(config, ToyReward(0.0))
    rows = engine.metrics_of(tmp_path / "run")
    assert [(row["pairs"], row["tie_rate"], row["optimizer_steps"]) for row in rows] == [(0, 1.0, 0)] * 3
    assert [row["reference_age"] for row in rows] == [0, 0, 0]
    before, after = (engine.policy_of(tmp_path / "run", step) for step in (1, 3))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class TiesBut(ToyReward):
    """The same score for all candidates, but for those of one step."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = super().score(videos, prompts)
        if self.first < len(self.seen) <= self.last:
            return found
        return {name: torch.ones_like(value) for name, value in found.items()}


@pytest.mark.parametrize(("ties", "stops"), [(20, True), (19, False)])
def test_a_run_stops_after_twenty_steps_in_a_row_without_a_pair(
    tmp_path: Path, ties: int, stops: bool
) -> None:
    """Ten steps of ties before a pair do not count, nor do nineteen after it."""
    rare = ("checkpoint.every=null", "pairs.dataset=none", "pairs_per_step=1", "rollout.candidates=2")
    config = engine.make_config(tmp_path, f"steps={10 + 1 + ties}", *rare)
    first = SCORED_FIRST + 2 * 10
    reward = TiesBut(first, first + 2)
    if stops:
        with pytest.raises(ValueError, match=r"every pair of the last 20 steps \(to step 31\) was a tie"):
            engine.train(config, reward)
    else:
        engine.train(config, reward)
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run") if row["pairs"]] == [11]


class LooksAtTheLock(ToyReward):
    """Tries to take the lock of the run's directory, whenever it scores."""

    def __init__(self, runs: Path, pattern: str) -> None:
        super().__init__()
        self.runs, self.pattern = runs, pattern

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        (root,) = self.runs.glob(self.pattern)
        with pytest.raises(ValueError, match="is in use by process"):
            RunLock(root)
        return super().score(videos, prompts)


@pytest.mark.parametrize("named", [True, False])
def test_a_run_holds_the_lock_of_its_directory_from_the_start_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Also of one that it names itself, under runs/."""
    monkeypatch.chdir(tmp_path)
    config = engine.make_config(tmp_path, "steps=1", "name=own", *(() if named else ("run_dir=null",)))
    looking = LooksAtTheLock(tmp_path, "run") if named else LooksAtTheLock(tmp_path / "runs", "own-*")
    engine.train(config, looking)
    (root,) = looking.runs.glob(looking.pattern)
    assert looking.seen
    with RunLock(root), pytest.raises(ValueError, match="is in use by process"):
        engine.train(engine.make_config(tmp_path, "steps=2", f"run_dir={root}"))


def test_a_run_begins_where_another_process_has_left_it_before_it_gave_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one saves step 2 after this one has found step 1, and before this one has the lock."""
    engine.train(engine.make_config(tmp_path, "steps=2"))
    newest, aside, enter = engine.checkpoint(tmp_path / "run", 2), tmp_path / "aside", RunLock.__enter__
    newest.rename(aside)

    def entered(lock: RunLock) -> RunLock:
        aside.rename(newest)
        return enter(lock)

    monkeypatch.setattr(RunLock, "__enter__", entered)
    recording = engine.train(engine.make_config(tmp_path, "steps=3"))
    assert len(recording.rows) == engine.metrics_of(tmp_path / "run")[-1]["pairs"], "step 3 alone"


class DriftingReward(ToyReward):
    """Scores the same video a little higher every time."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        drift = 1e-3 * len(self.seen)
        return {name: values + drift for name, values in super().score(videos, prompts).items()}


def test_a_reward_that_is_no_longer_deterministic_stops_a_run_when_it_is_resumed(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path, "steps=1"))
    reward = DriftingReward()
    with pytest.raises(ValueError, match="when scored again; rewards have to be deterministic"):
        engine.train(engine.make_config(tmp_path, "steps=2"), reward)
    assert len(reward.seen) == 2, "nothing but the check was scored"


def test_a_resumed_run_is_planned_with_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def planned(config: Config, *_: object) -> tuple[Config, str]:
        asked.append(config.rollout.batch_size)
        return config.model_copy(update={"rollout": config.rollout.model_copy(update={"batch_size": 6})}), ""

    monkeypatch.setattr("vpo_engine.training.configurations_are_here", lambda config: True)
    monkeypatch.setattr("vpo_engine.training.check_fits", planned)
    for steps in (1, 2):
        engine.train(engine.make_config(tmp_path, f"steps={steps}"))
    assert asked == ["auto", 6]


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (ValueError("it does not fit"), ("error", "it does not fit")),
        (KeyboardInterrupt(), ("ended", "stopped")),
    ],
)
def test_the_end_of_a_run_before_its_first_step_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, noted: tuple[str, str]
) -> None:
    """Else the next start would say that the system may have killed it."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("vpo_engine.training.build_reference", fail)
    with pytest.raises(type(error)):
        engine.train(engine.make_config(tmp_path))
    last = json.loads((tmp_path / "run/attempts.jsonl").read_text().splitlines()[-1])
    assert last.get(noted[0]) == noted[1]


def test_steps_without_a_pair_are_counted_on_when_a_run_goes_on(tmp_path: Path) -> None:
    """Twelve before the resume and eight after it are twenty."""
    rare = ("checkpoint.every=null", "pairs.dataset=none", "pairs_per_step=1", "rollout.candidates=2")
    engine.train(engine.make_config(tmp_path, "steps=12", *rare), ToyReward(0.0))
    with pytest.raises(ValueError, match=r"every pair of the last 20 steps \(to step 20\) was a tie"):
        engine.train(engine.make_config(tmp_path, "steps=25", *rare), ToyReward(0.0))


def test_a_run_that_is_refused_to_go_on_keeps_its_result(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path, "steps=1"))
    kept = [tmp_path / "run" / name for name in ("summary.json", "config.yaml")]
    before = [path.read_bytes() for path in kept]
    file = engine.checkpoint(tmp_path / "run", 1) / "reference.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was altered after it was saved"):
        engine.train(engine.make_config(tmp_path, "steps=2"))
    assert [path.read_bytes() for path in kept] == before


def test_a_start_that_fails_before_it_has_taken_over_the_checkpoint_keeps_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise ValueError("the optimizer state is of another setup")

    engine.train(engine.make_config(tmp_path, "steps=1"))
    monkeypatch.setattr("vpo_engine.trainer.restore", refuses)
    with pytest.raises(ValueError, match="another setup"):
        engine.train(engine.make_config(tmp_path, "steps=2"))
    for name in ("summary.json", "gallery/held_out.safetensors"):
        assert (tmp_path / "run" / name).is_file()
