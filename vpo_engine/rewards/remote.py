"""The reward of another process, as a ``Reward`` of this one.

The scores are those of the same reward in this process, bit for bit. ``process.py`` starts a child process that holds
the reward; ``served.py`` finds the rank of the run that does. Messages are those of ``wire.py``, and ``server.py``
answers them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from vpo_engine.errors import RewardProcessError
from vpo_engine.rewards.videos import Videos
from vpo_engine.rewards.wire import Message, Wire, recreate_error

_LATE_NEWS = 1.0
"""Seconds to wait for the reason of a failure elsewhere."""


class Holder(Protocol):
    """The process that holds a reward, as far as this process knows it."""

    @property
    def place(self) -> str:
        """Return a name of the process, for errors."""
        ...

    def obituary(self, doing: str) -> str:
        """Return the message of the error for a connection that has ended while the reward was ``doing`` something."""
        ...

    def kill(self) -> None:
        """End the process at once, if it belongs to this one."""
        ...

    def leave(self) -> None:
        """End the connection, and the process if it belongs to this one. Called once."""
        ...


class ConnectionEndedError(RewardProcessError):
    """The connection ended, and no message said why."""


class RemoteReward:
    """A ``Reward`` that another process holds, until ``close`` or the end of the ``with`` block.

    What the reward raises is raised here, of the same type and message, with its traceback as a note: by the request
    in progress, by the next one, or on leaving the block with an error that the failure has caused in this process
    (such as of a process group that lost a member). Threads may share it; they take turns.
    """

    def __init__(self, wire: Wire, holder: Holder, *, name: str, time_limit: float | None = None) -> None:
        """Ask over ``wire``. ``name`` is the reward's, for errors; ``time_limit`` is in seconds for one ``score``."""
        self._wire, self._holder, self._name, self._time_limit = wire, holder, name, time_limit
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._dimensions: tuple[str, ...] = ()
        self._end = weakref.finalize(self, holder.leave)
        self.stopping = False
        """True once the other process was asked to stop; it goes on serving until all that ask have left."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        self.wait_until_loaded()
        return self._dimensions

    def wait_until_loaded(self) -> None:
        """Return once the other process has made the reward, which has no time limit."""
        with self._lock:
            if not self._dimensions:
                self._dimensions = tuple(self._receive(None, "was made", "ready").texts("dimensions"))

    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what the reward itself returns, on the CPU. Raise RewardProcessError if its process died or hung."""
        fields, doing = {"prompts": list(prompts)}, f"scored {len(videos)} videos"
        answer = self._ask("score", "scores", fields, {"videos": videos}, doing, self._time_limit)
        self.stopping = answer.field("stopping", bool)
        if not all(isinstance(each, Tensor) for each in answer.tensors.values()):
            raise RewardProcessError(
                f"reward {self._name!r} sent something else than scores; let both sides run the same version of "
                "vpo-engine"
            )
        return answer.tensors

    def refusals(self, prompts: Sequence[str]) -> dict[int, str]:
        """Return why the reward refuses prompts, by their number. There is no time limit."""
        doing = f"looked at {len(prompts)} prompts"
        answer = self._ask("refusals", "refused", {"prompts": list(prompts)}, {}, doing, None)
        try:
            return {int(row): str(reason) for row, reason in answer.field("refused", list)}
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardProcessError(
                f"reward {self._name!r} told of refused prompts without their numbers ({error}); let both sides run "
                "the same version of vpo-engine"
            ) from error

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why the reward scores no videos of this size, or None. There is no time limit."""
        size = {"size": [frames, height, width]}
        answer = self._ask("size", "size", size, {}, "looked at a size of videos", None)
        return None if answer.fields.get("reason") is None else str(answer.field("reason", str))

    def _ask(
        self,
        kind: str,
        answer: str,
        fields: Mapping[str, Any],
        tensors: Mapping[str, Videos],
        doing: str,
        limit: float | None,
    ) -> Message:
        """Send a request and return the answer, a message of kind ``answer``; ``limit`` is in seconds for both."""
        self.wait_until_loaded()
        with self._lock:
            if not self._end.alive:
                raise RewardProcessError(
                    f"the process of reward {self._name!r} has ended; make the reward anew"
                )
            deadline = None if limit is None else time.monotonic() + limit
            try:
                with suppress(ConnectionError):  # of a process that has failed, the answer says why
                    self._wire.send(kind, fields, tensors, deadline)
            except BaseException as error:
                raise self._interrupted(error, doing) from None
            return self._receive(deadline, doing, answer)

    def close(self) -> None:
        """End the connection, and the process if it belongs to this one; may be called again."""
        self._end()

    def __enter__(self) -> RemoteReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._end.alive:
                return
            if error is None:
                with suppress(ConnectionError):
                    self._wire.send("farewell")
            elif isinstance(error, RuntimeError) and error is not self._failure:
                self._raise_late_news()
        finally:
            self.close()

    def _raise_late_news(self) -> None:
        """Raise the failure of the other process, if it tells of one or has told of one."""
        if self._lock.acquire(timeout=_LATE_NEWS):
            with suppress(ConnectionEndedError):
                while self._end.alive and self._failure is None and self._wire.poll(_LATE_NEWS):
                    self._receive(None, "was asked for news", None)
            self._lock.release()
        if self._failure is not None:
            raise self._failure

    def _receive(self, deadline: float | None, doing: str, kind: str | None) -> Message:
        """Return the next message, which is of this kind (None: any). Raise the error that it tells of instead."""
        try:
            answer = self._wire.receive(deadline)
        except BaseException as error:
            raise self._interrupted(error, doing) from None
        if answer.kind == "error":
            self._failure = recreate_error(answer.fields, self._holder.place)
            raise self._failure
        if kind is not None and answer.kind != kind:
            raise RewardProcessError(
                f"{self._holder.place} sent a message {answer.kind[:40]!r} where {kind!r} was expected; let both sides "
                "run the same version of vpo-engine"
            )
        return answer

    def _interrupted(self, error: BaseException, doing: str) -> BaseException:
        """End the connection, on which the next answer would be a late one; return the error to raise."""
        if isinstance(error, (EOFError, ConnectionError)):
            self.close()
            return ConnectionEndedError(self._holder.obituary(doing))
        self._holder.kill()
        self.close()
        if not isinstance(error, TimeoutError) or self._time_limit is None:
            return error
        return RewardProcessError(
            f"reward {self._name!r} took longer than its time limit of {self._time_limit:g} s while it {doing}, and "
            "was ended; raise the limit (reward.time_limit, or --time-limit of rank) if it is slow, or find out what "
            "it waits for"
        )
