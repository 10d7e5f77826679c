"""A reward model in a child process: on another device, with a time limit, and with its last words if it dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO

import torch

from vpo_engine.rewards.registry import RewardSpec
from vpo_engine.rewards.remote import RemoteReward
from vpo_engine.rewards.wire import Wire

_PATIENCE = 5.0
"""Seconds for the process to leave by itself once its connection is closed, before it is killed."""
_TAIL = 8192
"""Bytes of the process's standard error that are kept."""
_WORDS = 600
"""Characters of the standard error that an error message quotes."""


def start_reward(spec: RewardSpec, *, time_limit: float | None = None) -> RemoteReward:
    """Start a process and make the reward in it; return when that is done, which has no time limit.

    The process computes with as many threads and the same matrix precision as this one, leaves SIGINT and SIGTERM to
    it, and ends with it, however that ends. ``time_limit`` is in seconds for one ``score``; None is no limit. Raises
    what making the reward raises, and RewardProcessError if the process dies.
    """
    if time_limit is not None and not 0 < time_limit < float("inf"):
        raise ValueError(f"the time limit is {time_limit} seconds, expected a finite number above 0, or none")
    ours, theirs = socket.socketpair()
    wire = Wire(ours)
    with theirs:
        child = _Child(spec.kind, wire, _start(theirs))
    reward = RemoteReward(wire, child, name=spec.kind, time_limit=time_limit)
    request = {
        "reward": spec.to_fields(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    try:
        wire.send("make", request)
        reward.wait_until_loaded()
    except BaseException:
        reward.close()
        raise
    return reward


def _start(connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter that finds the modules that this one finds, in a session without this one's signals."""
    arguments = [str(connection.fileno()), str(os.getpid())]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "vpo_engine.rewards.server", *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        pass_fds=[connection.fileno()],
        start_new_session=True,
    )


class _Child:
    """The child process as a ``Holder``."""

    def __init__(self, name: str, wire: Wire, process: subprocess.Popen[bytes]) -> None:
        self.place = f"the process of reward {name!r}"
        self._wire, self._process = wire, process
        self._words = _LastWords(process)

    def obituary(self, doing: str) -> str:
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system kills when memory runs out"
        said = self._words.tail()
        return f"{self.place} died with {how} while it {doing}; " + (
            f"its last words: {said}" if said else "it left no words"
        )

    def kill(self) -> None:
        self._process.kill()

    def leave(self) -> None:
        """Close the connection, wait, kill if need be; afterwards the process is gone and waited for."""
        self._wire.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._words.finish()


class _LastWords:
    """The end of a process's standard error, which is passed on as it comes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        self._thread.start()

    def tail(self) -> str:
        """Return the last lines as one of at most ``_WORDS`` characters; of a crash the first, which say where."""
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines()]
        crash = next((row for row, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        text = " | ".join(line for line in lines[crash:] if line)
        if len(text) <= _WORDS:
            return text
        return f"... {text[-_WORDS:]}" if crash is None else f"{text[:_WORDS]} ..."

    def finish(self) -> None:
        """Wait for what an ended process has written; its own children may hold the pipe open."""
        self._thread.join(timeout=1.0)

    def _listen(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), _TAIL):
                self._kept += chunk
                del self._kept[:-_TAIL]
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()
