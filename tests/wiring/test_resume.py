"""Runs that are killed after one or several refreshes go on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from toy import ToyReward

from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.runs.log import RunLog
from vpo_engine.runs.progress import Progress

SETTINGS = (
    "steps=7",
    "objective.updates_per_rollout=2",
    "objective.timesteps_per_pair=2",
    "reference.refresh_every=3",
    "pairs.gap_power=1",
    "pairs.resample=1",
    "rollout.candidates=2",
    "optimizer.weight_decay=0.1",
)
"""14 optimizer steps; the reference is refreshed at 3, 6, 9 and 12, in the middle of steps 2 and 5."""
STORAGES = {
    "copy": ("reference.storage=copy",),
    "exact": ("reference.storage=exact8", "memory.weights=fp32_master"),
    "int8": ("reference.storage=int8", "memory.weights=stochastic_rounding", "memory.sequential=true"),
}


@pytest.fixture(scope="module", params=STORAGES)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...], engine.Recording]:
    """A run that nobody interrupted, its settings, and what reached the loss."""
    folder = tmp_path_factory.mktemp("whole")
    settings = (*SETTINGS, *STORAGES[request.param])
    return folder, settings, engine.train(engine.make_config(folder, *settings))


Whole = tuple[Path, tuple[str, ...], engine.Recording]


REFRESHES = {
    "before any refresh": (1, 0),
    "after one": (2, 3),
    "right after one": (3, 6),
    "after three": (5, 9),
}
"""The step that is resumed after, and the optimizer step of the last refresh before it."""


def stops() -> Iterator[object]:
    """Stops in a short time after a refresh and right after one; the others say the same of other steps."""
    for storage in STORAGES:
        for name, place in REFRESHES.items():
            short = name == "after one" or (storage, name) == ("copy", "right after one")
            marks = () if short else pytest.mark.long
            yield pytest.param(storage, *place, id=f"{storage}-{name}", marks=marks)


@pytest.mark.parametrize(("whole", "step", "refreshed_at"), [*stops()], indirect=["whole"])
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: Whole, tmp_path: Path, step: int, refreshed_at: int
) -> None:
    folder, settings, recording = whole
    run, again = folder / "run", tmp_path / "run"
    shutil.copytree(run, again)
    engine.forget_after(again, step)
    assert engine.state_of(again, step)["refreshed_at"] == refreshed_at
    config = engine.make_config(folder, *settings, f"run_dir={again}", "checkpoint.resume=true")
    resumed = engine.train(config)
    assert_same(run, again, 7)
    rest = recording.rows[len(recording.rows) - len(resumed.rows) :]
    assert 0 < len(resumed.rows) < len(recording.rows)
    for one, other in zip(rest, resumed.rows, strict=True):
        for name in ("winner", "loser", "noise", "caption"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.time, one.weight) == (other.time, other.weight)


def assert_same(run: Path, again: Path, step: int) -> None:
    for kind in ("train", "eval"):
        assert engine.metrics_of(again, kind) == engine.metrics_of(run, kind)
    ours, theirs = engine.lines_of(again), engine.lines_of(run)
    assert [replace(one, latents_file=None) for one in ours] == [
        replace(one, latents_file=None) for one in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        if one.kept:
            assert all(torch.equal(*both) for both in zip(one.latents(), other.latents(), strict=True))
    saved, expected = engine.saved_tensors(again, step), engine.saved_tensors(run, step)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    assert engine.state_of(again, step) == engine.state_of(run, step)
    assert engine.summary_of(again) == engine.summary_of(run)


def test_the_log_of_the_whole_run_counts_from_the_last_refresh(whole: Whole) -> None:
    folder, _, _ = whole
    rows = engine.metrics_of(folder / "run")
    assert [row["optimizer_steps"] for row in rows] == [2, 4, 6, 8, 10, 12, 14]
    assert [row["reference_age"] for row in rows] == [2, 1, 0, 2, 1, 0, 2]


class DyingReward(ToyReward):
    """Fails when it is asked for the first time after ``count`` videos."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def score(self, videos: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        if len(self.seen) >= self.count:
            raise RuntimeError("power cut")
        return super().score(videos, prompts)


def test_a_run_that_dies_within_a_step_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    """It dies in step 6, two steps after the last checkpoint; dataset and log then hold a step that is made again."""
    settings = (*SETTINGS, "checkpoint.every=4")
    first = engine.make_config(tmp_path / "whole", *settings)
    recording = engine.train(first)
    training = [one for one in recording.scored if one[1] not in engine.HELD_OUT]
    held_out = len(recording.scored) - len(training)
    again = f"run_dir={tmp_path / 'again'}"
    config = engine.make_config(tmp_path / "whole", *settings, again)
    with pytest.raises(RuntimeError, match="power cut"):
        engine.train(config, DyingReward(held_out // 2 + len(training) * 5 // 7 + 1))
    steps = [row["step"] for row in engine.metrics_of(tmp_path / "again")]
    assert steps[-1] > 4
    resumed = engine.make_config(tmp_path / "whole", *settings, again, "checkpoint.resume=true")
    engine.train(resumed)
    assert_same(tmp_path / "whole" / "run", tmp_path / "again", 7)


def test_a_run_that_was_finished_can_be_made_longer(tmp_path: Path) -> None:
    """The rows that reach the loss after a resume are those of the positions that follow, none twice, none left out."""
    short = engine.make_config(tmp_path, *SETTINGS, "steps=3", "optimizer.final_lr=1.0")
    engine.train(short)
    long = engine.make_config(tmp_path, *SETTINGS, "optimizer.final_lr=1.0", "checkpoint.resume=true")
    engine.train(long)
    whole = engine.make_config(tmp_path, *SETTINGS, "optimizer.final_lr=1.0", f"run_dir={tmp_path / 'whole'}")
    engine.train(whole)
    assert engine.metrics_of(tmp_path / "run") == engine.metrics_of(tmp_path / "whole")
    assert [line.position for line in engine.lines_of(tmp_path / "run")] == list(range(28))


def test_the_average_of_a_resumed_run_goes_on_by_optimizer_steps(tmp_path: Path) -> None:
    """Two are made in a step, and the decay rises with each."""
    settings = (*SETTINGS, "steps=2", "ema.decay=0.9")
    engine.train(engine.make_config(tmp_path, *settings))
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    engine.forget_after(again, 1)
    assert engine.state_of(again, 1)["optimizer_steps"] == 2
    engine.train(engine.make_config(tmp_path, *settings, f"run_dir={again}", "checkpoint.resume=true"))
    assert_same(run, again, 2)


LOOKS = (
    "steps=4",
    "evaluation.every=2",
    "guards.style_bound=0.01",
    "optimizer.lr=3e-2",
    "optimizer.warmup_steps=0",
    "optimizer.final_lr=1.0",
)
"""The look of the clips is beyond the bound at the first evaluation, that after step 2."""


def style_alarms(run: Path) -> list[int]:
    lines = map(json.loads, (run / "alarms.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "style"]


def stopped_at(config: Any, owner: type, name: str, number: int) -> None:
    """Run until a signal comes before call ``number`` of a method."""
    calls, method = count(1), getattr(owner, name)

    def stopped(*given: Any) -> Any:
        if next(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return method(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopped)
        engine.train(config, exit_code=143)


def test_a_longer_run_knows_the_alarm_of_the_evaluation_at_its_first_end(tmp_path: Path) -> None:
    for steps in (2, 4):
        engine.train(engine.make_config(tmp_path, *LOOKS, f"steps={steps}"))
        assert style_alarms(tmp_path / "run") == [2]


def test_a_longer_run_knows_the_rewards_of_the_evaluation_at_its_first_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps were saved when they were evaluated. Evaluations after one and three steps are in the checkpoints."""
    judged = partial(HeldOutScorers, judge=ToyReward(power=-1.0))
    monkeypatch.setattr(engine, "HeldOutScorers", judged)
    settings = ("evaluation.every=1", "optimizer.warmup_steps=0", "optimizer.final_lr=1.0")
    for steps, folder in ((2, "run"), (4, "run"), (4, "whole")):
        engine.train(
            engine.make_config(tmp_path, *settings, f"steps={steps}", f"run_dir={tmp_path / folder}")
        )
    seen = engine.state_of(tmp_path / "whole", 4)["guards"]
    assert [step for step, *_ in seen["observations"]] == [0, 1, 2, 3]
    assert engine.state_of(tmp_path / "run", 4)["guards"] == seen
    engine.forget_after(tmp_path / "run", 3)  # which was evaluated before it was saved
    engine.train(engine.make_config(tmp_path, *settings, "steps=4"))
    assert engine.state_of(tmp_path / "run", 4)["guards"] == seen


def test_the_alarm_of_an_evaluation_that_was_made_up_for_outlives_the_next_stop(tmp_path: Path) -> None:
    """The run is stopped in the evaluation after step 2, and again in step 3, before anything else is saved."""
    config = engine.make_config(tmp_path, *LOOKS)
    stopped_at(config, HeldOut, "evaluate", 2)
    stopped_at(config, OnlineVPO, "step", 1)
    engine.train(config)
    assert style_alarms(tmp_path / "run") == [2]


def test_an_alarm_of_an_evaluation_that_is_made_up_for_stops_before_another_step(tmp_path: Path) -> None:
    """The next start goes on, as after every alarm."""
    config = engine.make_config(tmp_path, *LOOKS, "guards.on_alarm=stop")
    stopped_at(config, HeldOut, "evaluate", 2)
    engine.train(config, exit_code=1)
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run")] == [1, 2]
    engine.train(config)
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("end", ["a signal", "a kill"])
def test_a_run_that_went_back_and_ended_before_its_next_save_goes_on_from_there(
    tmp_path: Path, end: str
) -> None:
    """Not from the checkpoints of the steps that it gave up, whose rows and pairs are gone."""
    engine.train(engine.make_config(tmp_path, "steps=4"))
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    own = ("steps=4", f"run_dir={again}")
    back = engine.make_config(tmp_path, *own, "checkpoint.from=2")
    if end == "a signal":
        stopped_at(back, StopPoints, "check", 1)
    else:
        with pytest.raises(RuntimeError, match="power cut"):
            engine.train(back, DyingReward(2))  # the check of the reward scores two
    assert [engine.checkpoint(again, step).is_dir() for step in (2, 3, 4)] == [True, False, False]
    engine.train(engine.make_config(tmp_path, *own))
    assert_same(run, again, 4)


def test_what_torchrun_starts_again_after_an_alarm_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code is 1, which torchrun takes for a failure. A person's next start goes on."""
    config = engine.make_config(tmp_path, *LOOKS, "guards.on_alarm=stop")
    engine.train(config, exit_code=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        engine.train(config, exit_code=1)
    monkeypatch.delenv("RANK")
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run")] == [1, 2]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    engine.train(config)
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_clips_that_a_run_gives_up_are_not_shown(tmp_path: Path) -> None:
    """Pairs of a step behind the checkpoint that it goes back to, and clips after an end that it goes beyond."""
    run = tmp_path / "run"
    engine.train(engine.make_config(tmp_path, "steps=4"))
    assert max(engine.galleries_of(run)) == 4
    engine.train(engine.make_config(tmp_path, "steps=3", "checkpoint.from=2"))
    assert max(engine.galleries_of(run)) < 4
    assert (run / "gallery/held_out.safetensors").is_file()
    stopped_at(engine.make_config(tmp_path, "steps=4"), StopPoints, "check", 1)
    assert not (run / "gallery/held_out.safetensors").exists()


def test_an_alarm_outlives_a_kill_while_the_clips_of_its_evaluation_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation after step 2 is made up for, and its row is written, or about to be."""

    def dies(*_: object) -> None:
        raise RuntimeError("power cut")

    for name in ("show_samples", "write"):
        own = tmp_path / name
        config = engine.make_config(own, *LOOKS, "guards.on_alarm=stop")
        stopped_at(config, HeldOut, "evaluate", 2)
        with monkeypatch.context() as patch:
            patch.setattr(RunLog, name, dies)
            with pytest.raises(RuntimeError, match="power cut"):
                engine.train(config)
        assert style_alarms(own / "run") == [2]
        engine.train(config, exit_code=int(name == "write"))  # it is made again, and its alarm stops the run
        assert style_alarms(own / "run") == [2]


def test_a_run_that_goes_back_behind_an_alarm_is_stopped_by_it_again(tmp_path: Path) -> None:
    settings = (*LOOKS, "guards.on_alarm=stop")
    engine.train(engine.make_config(tmp_path, *settings), exit_code=1)
    engine.train(engine.make_config(tmp_path, *settings, "checkpoint.from=1"), exit_code=1)
    assert style_alarms(tmp_path / "run") == [2]


def test_no_process_ends_with_an_error_before_the_report_of_an_alarm_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun would end the first one at it."""
    calls: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: calls.append(text.partition(":")[0]))
    monkeypatch.setattr(Processes, "wait", lambda self: calls.append("wait"))
    engine.train(engine.make_config(tmp_path, *LOOKS, "guards.on_alarm=stop"), exit_code=1)
    assert calls[-2:] == ["report", "wait"]
