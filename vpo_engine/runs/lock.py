"""A lock on a run directory, so that two processes do not write one run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from vpo_engine.distributed.machine import is_running, place
from vpo_engine.texts import read_json

LOCK_NAME = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Holds the lock of the run directory ``root`` until it is closed.

    The system frees it when the process ends, however that ends; the file that is left then locks nothing. A lock that
    outlives its holder, because a child process or a file server keeps it, is taken over: if the holder was a process
    of this machine that is gone, or of an earlier attempt of the same job. On file systems without locks nothing is
    locked. Raise ValueError, with host and process, if another process holds it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK_NAME
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    break
                holder, left = _read(self._path), self._is_in_place()
                os.close(self._file)
                if not (_is_gone(holder) or _is_earlier_attempt(holder)):
                    raise ValueError(_text(root, holder)) from None
                if left:
                    self._path.unlink(
                        missing_ok=True
                    )  # what holds the old file keeps it, and the new one is free
                continue
            if self._is_in_place():
                break
            os.close(self._file)
        os.truncate(self._file, 0)
        os.pwrite(self._file, json.dumps(_holder()).encode(), 0)

    def close(self) -> None:
        """Free the lock and remove its file."""
        if self._file >= 0:
            if self._is_in_place():
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_in_place(self) -> bool:
        """Return whether the path still leads to the file that is open, which its last holder may have removed."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False


def refuse_held(root: Path) -> None:
    """Raise ValueError, as RunLock would, if another process holds the lock of ``root``; take nothing."""
    if (root / LOCK_NAME).exists():
        RunLock(root).close()


def _holder() -> dict[str, Any]:
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "place": place(), **_job()}


def _job() -> dict[str, Any]:
    """Return the job of torchrun that this process belongs to; {} without one that has a name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name == "none":
        return {}
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return {"job": [name, os.environ.get("SLURM_JOB_ID")], "restart": restart}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that is not there any more."""
    here = place()
    return here is not None and holder.get("place") == here and not is_running(int(holder.get("pid", 0)))


def _is_earlier_attempt(holder: dict[str, Any]) -> bool:
    """Return whether the holder belongs to this job on another machine, which the job has lost since.

    A job of Slurm has a number that no other has. Names that are given to torchrun by hand may be used twice, so they
    count only if this attempt is a later one.
    """
    own = _job()
    if not own or own["job"] != holder.get("job") or holder.get("host") == socket.gethostname():
        return False
    return own["job"][1] is not None or own["restart"] > holder.get("restart", 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, "lock")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(root: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"host", "pid", "since"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    return f"{root} is in use by {who}; wait until it has ended, stop it, or give another run_dir"
