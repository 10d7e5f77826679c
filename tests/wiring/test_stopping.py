"""Runs that are stopped by a signal, or die, at every kind of place go on as if nothing had happened, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from test_resume import assert_same

from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.evaluation.finished_runs import compare
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.method import Step
from vpo_engine.metrics.held_out import HeldOut
from vpo_engine.metrics.reward_monitor import RewardMonitor
from vpo_engine.metrics.step_watch import Alarm
from vpo_engine.objectives.dpo import DPO
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.runs.log import RunLog
from vpo_engine.values import Prompt

SETTINGS = (
    "steps=4",
    "objective.updates_per_rollout=2",
    "objective.micro_batch_size=2",
    "reference.refresh_every=3",
    "pairs.resample=1",
    "pairs.dataset=latents",
    "evaluation.every=2",
    "checkpoint.every=3",
    "checkpoint.keep=9",
)


class DeadError(BaseException):
    """Stands for a process that is killed: nothing catches it, nothing is saved."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody stopped, and how often it asked whether it should stop."""
    folder, asked = tmp_path_factory.mktemp("whole"), 0

    def count(points: StopPoints) -> None:
        nonlocal asked
        asked += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopPoints, "check", count)
        engine.train(engine.make_config(folder, *SETTINGS))
    assert asked > 60
    return folder, asked


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Do something once, before the call number ``number`` of a method."""

    def arrange(owner: type, name: str, number: int, act: Callable[[], None]) -> None:
        method, calls = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                act()
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    yield arrange
    monkeypatch.undo()


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def die() -> None:
    raise DeadError


@pytest.mark.parametrize(
    "part", [0, 2, 5, 7, *(pytest.param(part, marks=pytest.mark.long) for part in (1, 3, 4, 6))]
)
def test_a_signal_at_any_place_loses_nothing(
    whole: tuple[Path, int],
    part: int,
    tmp_path: Path,
    at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, asked = whole
    at(StopPoints, "check", 1 + part * (asked - 1) // 7, terminate)
    config = engine.make_config(folder, *SETTINGS, f"run_dir={tmp_path / 'run'}")
    engine.train(config, exit_code=143)
    monkeypatch.undo()
    said = capfd.readouterr()
    assert "SIGTERM: giving up what is not finished, " in said.err
    assert "stopped by SIGTERM" in said.out
    done = max((row["step"] for row in engine.metrics_of(tmp_path / "run")), default=0)
    assert not done or engine.checkpoint(tmp_path / "run", done).is_dir()
    engine.train(config)
    assert_same(folder / "run", tmp_path / "run", 4)


@pytest.mark.parametrize("row", [1, 3, 4, *(pytest.param(row, marks=pytest.mark.long) for row in (2, 5, 6))])
def test_a_signal_between_two_steps_is_as_good(
    whole: tuple[Path, int],
    row: int,
    tmp_path: Path,
    at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 1 is the evaluation of the base policy, row 4 that after step 2."""
    folder, _ = whole
    at(RunLog, "write", row, terminate)
    config = engine.make_config(folder, *SETTINGS, f"run_dir={tmp_path / 'run'}")
    engine.train(config, exit_code=143)
    monkeypatch.undo()
    engine.train(config)
    assert_same(folder / "run", tmp_path / "run", 4)


@pytest.mark.parametrize("part", [1, 3, *(pytest.param(part, marks=pytest.mark.long) for part in (0, 2, 4))])
def test_a_run_that_dies_at_any_place_goes_on_by_the_same_command(
    whole: tuple[Path, int],
    part: int,
    tmp_path: Path,
    at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, asked = whole
    at(StopPoints, "check", 1 + part * (asked - 1) // 4, die)
    config = engine.make_config(folder, *SETTINGS, f"run_dir={tmp_path / 'run'}")
    with pytest.raises(DeadError):
        engine.train(config)
    monkeypatch.undo()
    engine.train(config)
    assert_same(folder / "run", tmp_path / "run", 4)


def test_a_signal_is_followed_at_the_next_look_and_not_at_the_end_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sampled, decoded, scored or trained on after it."""
    check, looks = StopPoints.check, []

    def counted(points: StopPoints) -> None:
        looks.append(points)
        if len(looks) == 40:
            terminate()
        check(points)

    monkeypatch.setattr(StopPoints, "check", counted)
    engine.train(engine.make_config(tmp_path, *SETTINGS), exit_code=143)
    assert len(looks) == 40


def test_a_step_that_changes_weights_in_the_backward_pass_is_not_given_up(
    tmp_path: Path, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes while the micro-batch of step 2 is made; afterwards the weights of step 1 are gone."""
    early = ("steps=3", "memory.step_in_backward=true", "optimizer.clip=null")
    engine.train(engine.make_config(tmp_path / "whole", *early))
    at(DPO, "micro_batch", 2, terminate)
    config = engine.make_config(tmp_path / "stopped", *early)
    engine.train(config, exit_code=143)
    monkeypatch.undo()
    assert [row["step"] for row in engine.metrics_of(tmp_path / "stopped/run")] == [1, 2]
    engine.train(config)
    assert_same(tmp_path / "whole/run", tmp_path / "stopped/run", 3)


def test_a_process_does_not_leave_an_update_that_processes_make_in_lockstep(
    tmp_path: Path, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes while the first micro-batch is made: the others follow before the step is given up."""
    monkeypatch.setattr(PolicyOptimizer, "in_lockstep", True)
    settings = ("steps=1", "objective.micro_batch_size=1")
    whole = engine.train(engine.make_config(tmp_path / "whole", *settings))
    at(DPO, "micro_batch", 1, terminate)
    stopped = engine.train(engine.make_config(tmp_path / "stopped", *settings), exit_code=143)
    assert len(stopped.rows) == len(whole.rows) > 1
    assert not engine.metrics_of(tmp_path / "stopped/run")


def test_ctrl_c_has_its_own_exit_code_and_a_second_one_stops_at_once(
    tmp_path: Path, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    at(StopPoints, "check", 40, lambda: signal.raise_signal(signal.SIGINT))
    config = engine.make_config(tmp_path, *SETTINGS)
    engine.train(config, exit_code=130)
    monkeypatch.undo()

    def twice() -> None:
        terminate()
        terminate()

    at(StopPoints, "check", 5, twice)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM after SIGTERM"):
        engine.train(config)


def test_a_finished_run_is_left_alone(whole: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = whole
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    recording = engine.train(engine.make_config(folder, *SETTINGS))
    assert not recording.rows
    assert f"the run at {folder / 'run'} is finished: step 4 is its last" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}


def test_a_run_that_dies_after_its_summary_is_not_taken_for_finished(
    whole: tuple[Path, int], tmp_path: Path, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = whole
    at(RunLog, "show_held_out", 1, die)
    config = engine.make_config(folder, *SETTINGS, f"run_dir={tmp_path / 'run'}")
    with pytest.raises(DeadError):
        engine.train(config)
    monkeypatch.undo()
    assert (tmp_path / "run/summary.json").exists()
    again: list[int] = []
    at(RunLog, "show_held_out", 1, lambda: again.append(1))
    engine.train(config)
    assert again, "the rest of the end was made up for"
    assert_same(folder / "run", tmp_path / "run", 4)
    engine.train(config)
    assert again == [1]


def test_a_longer_run_that_is_stopped_in_its_last_evaluation_is_not_finished(
    tmp_path: Path, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor has it the summary of the shorter run any more."""
    engine.train(engine.make_config(tmp_path, "steps=1"))
    summary = engine.summary_of(tmp_path / "run")
    longer = engine.make_config(tmp_path, "steps=2")
    at(HeldOut, "evaluate", 1, terminate)
    engine.train(longer, exit_code=143)
    monkeypatch.undo()
    assert engine.checkpoint(tmp_path / "run", 2).is_dir()
    assert not (tmp_path / "run/summary.json").exists()
    engine.train(longer)
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run", "eval")] == [0, 1, 2]
    assert engine.summary_of(tmp_path / "run") != summary


def test_a_run_goes_on_from_a_checkpoint_that_is_named(whole: tuple[Path, int], tmp_path: Path) -> None:
    folder, _ = whole
    own = f"run_dir={tmp_path / 'run'}"
    engine.train(engine.make_config(folder, *SETTINGS, own))
    engine.train(engine.make_config(folder, *SETTINGS, own, "checkpoint.from=3"))
    assert_same(folder / "run", tmp_path / "run", 4)


def poison_weights(algorithm: OnlineVPO) -> None:
    with torch.no_grad():
        algorithm.parameters[0].fill_(float("nan"))


def poison_gradients(algorithm: OnlineVPO) -> None:
    average = algorithm.processes.average_gradients

    def averaged(parameters: list[torch.nn.Parameter]) -> None:
        average(parameters)
        parameters[0].grad[...] = float("inf")  # type: ignore[index]

    object.__setattr__(algorithm.processes, "average_gradients", averaged)


def poison_loss(algorithm: OnlineVPO) -> None:
    """The gradient of a loss beyond all numbers may still be finite."""
    backward = algorithm._backward
    algorithm._backward = lambda *args, **kwargs: backward(*args, **kwargs) | {"loss": float("inf")}


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (poison_loss, "the loss is inf"),
        (poison_weights, "the policy samples latents that are not finite"),
        (poison_gradients, "the gradient norm is inf at optimizer step 5; the policy was not changed"),
    ],
)
def test_a_policy_that_diverges_is_named_with_its_settings_and_the_last_checkpoint(
    poison: Callable[[OnlineVPO], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = OnlineVPO.step, []

    def poisoned(algorithm: OnlineVPO, prompts: Sequence[Prompt]) -> Step:
        steps.append(prompts)
        if len(steps) == 3:
            poison(algorithm)
        return step(algorithm, prompts)

    monkeypatch.setattr(OnlineVPO, "step", poisoned)
    config = engine.make_config(tmp_path, *SETTINGS, "checkpoint.every=2")
    with pytest.raises(
        ValueError, match=f"the policy has diverged in step 3: {reason}; optimizer.lr="
    ) as caught:
        engine.train(config)
    rows = engine.metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    last = engine.checkpoint(tmp_path / "run", 2)
    message = str(caught.value)
    assert (
        f"objective.beta={config.objective.beta:g}, the last gradient norm was {rows[-1]['grad_norm']:.3g}"
        in message
    )
    assert f"the last good checkpoint is {last}. Start a run with a lower optimizer.lr" in message
    assert all(torch.isfinite(value).all() for value in engine.policy_of(tmp_path / "run", 2).values())
    assert [path.name for path in last.parent.iterdir()] == [last.name]


def test_an_alarm_of_the_last_step_does_not_keep_the_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm = Alarm(1, "saturation", "the log-sigmoid is saturated")
    monkeypatch.setattr(RewardMonitor, "step", lambda *_: ({}, [alarm]))
    engine.train(engine.make_config(tmp_path, "steps=1", "guards.on_alarm=stop"))
    run = tmp_path / "run"
    assert [row["step"] for row in engine.metrics_of(run, "eval")] == [0, 1]
    assert (run / "summary.json").is_file()


def test_a_reward_that_reads_no_prompt_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardMonitor, "prompts", lambda *_: [Alarm(0, "prompt", "it reads none")])
    engine.train(engine.make_config(tmp_path, "steps=2", "guards.on_alarm=stop"))
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run")] == [1, 2]


def test_a_resumed_run_that_is_stopped_in_its_first_step_says_where_it_is(
    tmp_path: Path, at: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    engine.train(engine.make_config(tmp_path, "steps=1"))
    capfd.readouterr()
    at(DPO, "micro_batch", 1, terminate)
    engine.train(engine.make_config(tmp_path, "steps=2"), exit_code=143)
    said = capfd.readouterr()
    assert "then saving step 1;" in said.err
    assert "stopped by SIGTERM after step 1, which is saved" in said.out


def test_a_run_that_was_made_longer_has_no_result_until_it_ends_again(
    whole: tuple[Path, int], tmp_path: Path, at: Callable[..., None]
) -> None:
    run = Path(shutil.copytree(whole[0] / "run", tmp_path / "run"))
    at(StopPoints, "check", 1, terminate)
    engine.train(engine.make_config(whole[0], *SETTINGS, "steps=6", f"run_dir={run}"), exit_code=143)
    with pytest.raises(ValueError, match="the run has not finished"):
        compare([run])


def test_every_process_of_a_finished_run_ends_at_once(
    whole: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vpo_engine.training.run_training", lambda _: pytest.fail("it would wait for the first one")
    )
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    engine.train(engine.make_config(whole[0], *SETTINGS))


def test_a_signal_in_the_second_update_of_a_step_waits_for_the_end_of_the_step(
    whole: tuple[Path, int], tmp_path: Path, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has changed the weights already."""
    at(OnlineVPO, "_update", 2, terminate)
    config = engine.make_config(whole[0], *SETTINGS, f"run_dir={tmp_path / 'run'}")
    engine.train(config, exit_code=143)
    monkeypatch.undo()
    assert [row["step"] for row in engine.metrics_of(tmp_path / "run")] == [1]
    engine.train(config)
    assert_same(whole[0] / "run", tmp_path / "run", 4)
