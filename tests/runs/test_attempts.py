"""A run that is started again and again says that it gets no further."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpo_engine.runs.attempts import (
    begin_attempt,
    end_attempt,
    fail_attempt,
    stopped_by_alarm,
    was_cut_short,
)
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create_at(tmp_path / "run", "name: x\n")


def test_the_first_attempt_and_one_that_got_further_say_nothing(run: RunDirectory) -> None:
    assert begin_attempt(run, 0) is None
    fail_attempt(run, 5, 1, "the reward failed")
    assert begin_attempt(run, 4) is None


def test_the_same_error_twice_is_said_not_to_go_away(run: RunDirectory) -> None:
    begin_attempt(run, 4)
    fail_attempt(run, 5, 1, "the disk is full: 1000 bytes free")
    once = begin_attempt(run, 4)
    assert once == (
        "the attempt before began after step 4 as well, and saved nothing; the last ended in step 5 by an error of "
        "rank 1: the disk is full: 1000 bytes free"
    )
    fail_attempt(run, 5, 1, "the disk is full: 999 bytes free")
    twice = begin_attempt(run, 4)
    assert twice is not None
    assert twice.startswith(
        "the 2 attempts before began after step 4 as well, and saved nothing; all of them ended in"
    )
    assert twice.endswith("999 bytes free. Starting again does not help: mend the cause")
    fail_attempt(run, 6, 0, "another error")
    third = begin_attempt(run, 4)
    assert third is not None
    assert third.endswith("the last ended in step 6 by an error of rank 0: another error")


def test_an_attempt_that_was_killed_leaves_no_word(run: RunDirectory) -> None:
    begin_attempt(run, 4)
    with (run.root / "attempts.jsonl").open("a") as file:
        file.write('{"time": "20')  # it died here
    note = begin_attempt(run, 4)
    assert note is not None
    assert "ended without a word" in note
    assert "checkpoint.every" in note


def test_a_run_that_was_asked_to_stop_is_no_failure(run: RunDirectory) -> None:
    begin_attempt(run, 0)
    end_attempt(run, "stopped")
    assert begin_attempt(run, 0) is None


def test_only_the_last_attempt_tells_whether_the_run_came_to_its_end(run: RunDirectory) -> None:
    assert not was_cut_short(run), "an older run, of which nothing is known"
    begin_attempt(run, 0)
    assert was_cut_short(run)
    end_attempt(run, "stopped")
    assert was_cut_short(run)
    begin_attempt(run, 2)
    end_attempt(run, "finished")
    assert not was_cut_short(run)
    begin_attempt(run, 4)
    assert was_cut_short(run), "it was made longer"


def test_an_attempt_that_saved_is_not_said_to_have_saved_nothing_when_the_run_goes_back(
    run: RunDirectory,
) -> None:
    begin_attempt(run, 4)
    save_checkpoint(run.checkpoints, 6, tensors={}, state={}, write_policy=None, keep=9)
    fail_attempt(run, 7, 0, "the policy has diverged in step 7")
    assert begin_attempt(run, 4) is None
    assert "saved nothing" in (begin_attempt(run, 4) or "")


def test_of_several_processes_that_failed_the_first_is_told(run: RunDirectory) -> None:
    begin_attempt(run, 4)
    fail_attempt(run, 5, 1, "the reward failed")
    fail_attempt(run, 5, 0, "a connection was closed")
    note = begin_attempt(run, 4)
    assert note is not None
    assert note.endswith("the last ended in step 5 by an error of rank 1: the reward failed")


def test_an_alarm_of_an_earlier_job_does_not_end_the_restarts_of_a_later_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    begin_attempt(run, 0)
    end_attempt(run, "alarm")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert stopped_by_alarm(run.root)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")  # whose first attempt died while it loaded the model
    assert not stopped_by_alarm(run.root)
