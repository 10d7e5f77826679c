"""A reward model in a process of its own: on another device, with a time limit, and its death is no mystery.

Videos pass through memory that both processes map, requests and scores through a pipe. The scores are those of the
same reward in this process, bit for bit: as many threads, the same matrix precision, the same calls. B: videos.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from vpo_engine.protocols import Reward

_PATIENCE = 5.0
"""Seconds for the process to leave by itself once its pipe is closed, before it is killed."""
_TAIL = 8192
"""Bytes of its standard error that are kept."""
_WORDS = 600
"""Characters of it that an error quotes."""


class RewardProcessError(RuntimeError):
    """The reward's process died, or was ended because it gave no answer in time."""


class ProcessReward:
    """A ``Reward`` that lives in a child process, from ``__init__`` until ``close``.

    What the reward raises is raised here, of the same type and message, with its traceback as a note. The child leaves
    SIGINT and SIGTERM to this process and ends with it, however that ends. Not for use from several threads at once.
    """

    def __init__(self, make: Callable[[], Reward], *, name: str, time_limit: float | None = None) -> None:
        """Start the process and make the reward in it; returns when that is done, which has no time limit.

        make: as pickle takes it, such as ``functools.partial(build_reward, "videoscore", path)``. name: for errors.
        time_limit: seconds that one ``score`` may take; None: any. Raises what ``make`` raises, RewardProcessError if
        the process dies.
        """
        if time_limit is not None and not 0 < time_limit < float("inf"):
            raise ValueError(
                f"the time limit is {time_limit} seconds, expected a finite number above 0, or none"
            )
        self._name, self._time_limit = name, time_limit
        self._memory = _memory_file()
        self._map: mmap.mmap | None = None
        self._connection, theirs = Pipe()
        self._process = _start(theirs, self._memory)
        theirs.close()
        self._words = _LastWords(self._process)
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        how = (torch.get_num_threads(), torch.get_float32_matmul_precision())
        try:
            self.dimensions: tuple[str, ...] = self._ask((make, *how), None, "was made")
        except BaseException:
            self.close()
            raise

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the reward itself, scores on the CPU. RewardProcessError where the process died, hung or was closed."""
        if not self._end.alive:
            raise RewardProcessError(f"the process of reward {self._name!r} has ended; make the reward anew")
        self._share(videos)
        request = (tuple(videos.shape), videos.dtype, list(prompts))
        return self._ask(request, self._time_limit, f"scored {len(videos)} videos")

    def close(self) -> None:
        """End the process; may be called again."""
        self._end()
        self._words.finish()
        self._memory.close()

    def __enter__(self) -> ProcessReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _share(self, videos: Tensor) -> None:
        """Copy to the mapped memory, from whatever device; it grows as needed."""
        size = videos.numel() * videos.element_size()
        if self._map is None or len(self._map) < size:
            os.ftruncate(self._memory.fileno(), max(size, mmap.PAGESIZE))
            self._map = mmap.mmap(self._memory.fileno(), max(size, mmap.PAGESIZE))
        _view(self._map, tuple(videos.shape), videos.dtype).copy_(videos)

    def _ask(self, request: object, time_limit: float | None, doing: str) -> Any:
        """The answer to a request. Whatever interrupts the wait ends the process: its next answer would be stale."""
        try:
            self._connection.send_bytes(pickle.dumps(request))
            if not self._connection.poll(time_limit):
                self._kill()
                raise RewardProcessError(
                    f"reward {self._name!r} took longer than its time limit of {time_limit:g} s while it {doing}, "
                    "and was ended; raise the limit (reward.time_limit, or --time-limit of rank) if it is slow, or "
                    "find out what it waits for"
                )
            good, *answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise RewardProcessError(self._obituary(doing)) from None
        except BaseException:
            self._kill()
            raise
        if good:
            return answer[0]
        error, trace = answer
        error.add_note(f"in the process of reward {self._name!r}:\n{trace}")
        raise error

    def _kill(self) -> None:
        self._process.kill()
        self.close()

    def _obituary(self, doing: str) -> str:
        self.close()
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system kills when memory runs out"
        said = self._words.tail()
        return f"the process of reward {self._name!r} died with {how} while it {doing}; " + (
            f"its last words: {said}" if said else "it left no words"
        )


class _LastWords:
    """Passes on the process's standard error as it comes, and keeps its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        self._thread.start()

    def tail(self) -> str:
        """The last lines, as one of at most ``_WORDS`` characters; of a crash, without its list of modules."""
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines()]
        text = " | ".join(line for line in lines if line and not line.startswith("Extension modules:"))
        return text if len(text) <= _WORDS else f"... {text[-_WORDS:]}"

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


def _memory_file() -> IO[bytes]:
    """Nameless memory, which is gone with the last process that holds it; where there is none, an unlinked file."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("vpo-videos"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _view(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The videos that lie at its start."""
    empty = torch.empty(shape, dtype=dtype, device="meta")
    if not empty.numel():
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=empty.numel()).view(shape)


def _start(connection: Connection, memory: IO[bytes]) -> subprocess.Popen[bytes]:
    """A fresh interpreter, which sees the modules that this one sees; in a session of its own, without its signals."""
    files = (connection.fileno(), memory.fileno())
    call = f"serve({files[0]}, {files[1]}, {os.getpid()})"
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; {call}",
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=files,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """Close the pipe, wait, kill if need be; afterwards the process is gone and waited for."""
    connection.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(connection_file: int, memory_file: int, parent: int) -> None:
    """What the child does: make the reward, then score until the pipe is closed."""
    faulthandler.enable(all_threads=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(connection_file)
    reward: list[Reward] = []

    def make(request: bytes) -> tuple[str, ...]:
        maker, threads, precision = pickle.loads(request)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        reward.append(maker())
        return tuple(reward[0].dimensions)

    def score(request: bytes) -> dict[str, Tensor]:
        shape, dtype, prompts = pickle.loads(request)
        videos = _view(mmap.mmap(memory_file, 0), shape, dtype)
        return {name: values.cpu() for name, values in reward[0].score(videos, prompts).items()}

    try:
        _reply(connection, make)
        while True:
            _reply(connection, score)
    except (EOFError, ConnectionError):
        sys.stdout.flush()
        os._exit(0)  # nothing is left to do, and libraries take seconds to leave


def _reply(connection: Connection, answer: Callable[[bytes], object]) -> None:
    request = connection.recv_bytes()
    try:
        reply = pickle.dumps((True, answer(request)))
    except Exception as error:
        reply = pickle.dumps((False, portable(error), traceback.format_exc()))
    connection.send_bytes(reply)


def portable(error: Exception) -> Exception:
    """The error as the other side can have it: some cannot be pickled, or not be made from what was."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__qualname__}: {error}")
    return error


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, also in the middle of a score."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
