"""The lock of a run directory: one holder, whoever it is, and no trace of those that died."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vpo_engine.runs.lock import LOCK_NAME, RunLock

HOLD = "import sys, time; from pathlib import Path; from vpo_engine.runs.lock import RunLock; "
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on \S+, since 20\d\d-"):
            RunLock(tmp_path)
        with pytest.raises(ValueError, match="wait until it has ended, stop it, or give another run_dir"):
            RunLock(tmp_path)
    assert not (tmp_path / LOCK_NAME).exists()
    RunLock(tmp_path).close()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"is in use by process {other.pid} on"):
            RunLock(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / LOCK_NAME).exists()
    RunLock(tmp_path).close()
    assert not (tmp_path / LOCK_NAME).exists()


def test_nothing_is_left_of_the_longer_name_of_a_dead_holder(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text(json.dumps({"host": "h" * 500}))
    with RunLock(tmp_path), pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        RunLock(tmp_path)


def test_a_lock_that_was_removed_by_its_holder_is_not_taken_for_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes the file between another's opening it and locking it."""
    first, lock, tries = RunLock(tmp_path), fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not tries:
            first.close()
        tries.append(file)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = RunLock(tmp_path)
    assert len(tries) == 2
    assert (tmp_path / LOCK_NAME).exists()
    with pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path)
    second.close()


def hold_as(root: Path, **holder: object) -> RunLock:
    """Hold the lock in the name of another process."""
    lock = RunLock(root)
    path = root / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | holder))
    return lock


@pytest.mark.parametrize("waited", [True, False])
def test_the_lock_that_outlives_a_dead_process_is_taken_over(tmp_path: Path, waited: bool) -> None:
    """A child of the dead process still has the file open. Its parent may not have waited for it yet."""
    with subprocess.Popen(["true"]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        if waited:
            dead.wait()
        old = hold_as(tmp_path, pid=dead.pid)
        mine = RunLock(tmp_path)
    with mine:
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
            RunLock(tmp_path)
        old.close()
        assert (tmp_path / LOCK_NAME).exists(), "the old holder leaves the new one's file alone"


@pytest.mark.parametrize("other", [{"place": "another container"}, {"place": None}])
def test_a_process_that_cannot_be_seen_from_here_is_not_taken_for_dead(
    tmp_path: Path, other: dict[str, str | None]
) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    with hold_as(tmp_path, pid=dead.pid, **other), pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path)


@pytest.mark.parametrize(
    ("mine", "holder", "free"),
    [
        (("a", None, 1), ("a", None, 0), True),
        (("a", None, 0), ("a", None, 0), False),
        (("a", None, 1), ("b", None, 0), False),
        (("none", None, 1), ("none", None, 0), False),
        (("a", "17", 0), ("a", "17", 0), True),
        (("a", "17", 1), ("a", "18", 0), False),
    ],
)
def test_the_lock_of_a_lost_machine_goes_to_a_later_attempt_of_the_same_job(
    mine: tuple[str, str | None, int],
    holder: tuple[str, str | None, int],
    free: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hold_as(tmp_path, host="lost", place="lost", job=list(holder[:2]), restart=holder[2]):
        for name, value in zip(("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"), mine[:2], strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(mine[2]))
        if free:
            RunLock(tmp_path).close()
            return
        with pytest.raises(ValueError, match=r"is in use by process .* on lost"):
            RunLock(tmp_path)


def test_a_process_of_this_job_that_runs_here_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be started twice in one allocation of Slurm, or restarted while the earlier attempt still runs."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with RunLock(tmp_path), pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        RunLock(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_locks_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path), RunLock(tmp_path):
        pass


def test_a_file_that_nobody_can_read_is_another_process(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK_NAME).write_text("[")
        with pytest.raises(ValueError, match="is in use by another process"):
            RunLock(tmp_path)
