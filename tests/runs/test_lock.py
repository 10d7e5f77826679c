"""The lock of a run directory: one holder, whoever it is, and no trace of those that died."""

from __future__ import annotations

import errno
import fcntl
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


def test_a_file_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path), RunLock(tmp_path):
        pass


def test_a_file_that_nobody_can_read_is_another_process(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK_NAME).write_text("[")
        with pytest.raises(ValueError, match="is in use by another process"):
            RunLock(tmp_path)
