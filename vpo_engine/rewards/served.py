"""A reward model in a process of its own among those of a run, which all the others ask.

The others find it through the store of the process group; videos and scores pass over sockets, on one machine or
between several. The scores are those of the same reward in the asking process, bit for bit.
"""

from __future__ import annotations

import hmac
import json
import os
import pickle
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vpo_engine.protocols import Reward
from vpo_engine.rewards.process import RewardProcessError, portable
from vpo_engine.runs.signals import StopRequest

_KEY = "reward"
_ARRIVAL = 300.0
"""Seconds for all asking processes to connect."""
_INTRODUCTION = 5.0
"""Seconds for one that has connected to say who it is."""
_FAREWELL = 10.0
"""Seconds for the asking processes to leave after a failure was told to them."""
_LATE_NEWS = 1.0
"""Seconds in which the reason of a failure elsewhere arrives."""
_TOKEN_BYTES = 32


class ServedReward:
    """The ``Reward`` that another process ``serve``s. To be entered: leaving says how this process ended.

    What the served reward raises is raised here, of the same type and message, with its traceback as a note: by the
    request in progress, or by the next one, or on leaving with an error that the failure has caused in this process
    (such as of a process group that lost a member).
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        """Connect to the server that meets at ``store``, as process ``rank``; returns before its model is loaded."""
        host, port, token = json.loads(store.get(_KEY))
        self._socket = socket.create_connection((host, port))
        self._connection = Connection(self._socket.dup().detach())
        self._connection.send_bytes(bytes.fromhex(token))
        self._connection.send_bytes(pickle.dumps(rank))
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._dimensions: tuple[str, ...] = ()
        self.stopping = False
        """The server's process was asked to stop; it goes on serving until the others leave."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        self.wait_until_loaded()
        return self._dimensions

    def wait_until_loaded(self) -> None:
        """Return once the server has its reward."""
        with self._lock:
            if not self._dimensions:
                self._dimensions = self._receive()

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the reward itself, scores on the CPU."""
        assert videos.dtype == torch.uint8
        self.wait_until_loaded()
        with self._lock:
            # Of a server that has failed, the answer says why.
            with suppress(ConnectionError):
                self._connection.send_bytes(pickle.dumps((tuple(videos.shape), list(prompts))))
                self._connection.send_bytes(videos.cpu().contiguous().view(-1).numpy().data)
            scores, self.stopping = self._receive()
        return dict(scores)

    def __enter__(self) -> ServedReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._connection.send_bytes(pickle.dumps(None))
            elif isinstance(error, RuntimeError) and error is not self._failure:
                self._raise_late_news()
        finally:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that still waits for scores
            self._socket.close()
            self._connection.close()

    def _raise_late_news(self) -> None:
        if self._lock.acquire(timeout=_LATE_NEWS):
            with suppress(_SilenceError):
                while self._failure is None and self._connection.poll(_LATE_NEWS):
                    self._receive()
            self._lock.release()
        if self._failure is not None:
            raise self._failure

    def _receive(self) -> Any:
        try:
            good, *answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise _SilenceError(
                "the process of the reward model (that of the last rank) ended without a word; see what it printed, "
                "and whether the system killed it"
            ) from None
        if good:
            return answer[0]
        self._failure, where = answer
        self._failure.add_note(f"in the process of the reward model:\n{where}")
        raise self._failure


class _SilenceError(RewardProcessError):
    """The connection ended, with nothing that says why."""


def serve(make: Callable[[], Reward], store: dist.Store, asking: int) -> None:
    """Load a reward and score for ``asking`` processes with a ServedReward each, until all have left.

    What loading or scoring raises is told to all of them and raised. RewardProcessError if one of them leaves by an
    error, dies, or does not come. A first SIGTERM or SIGINT is passed on to them; a second one is KeyboardInterrupt.
    """
    door = _Door(store, asking)
    try:
        reward = make()
        door.admit_all()
        with StopRequest() as stop:
            for member in door.members:
                member.send_bytes(pickle.dumps((True, tuple(reward.dimensions))))
            _answer(door, reward, stop)
    except Exception as error:
        door.tell(error)
        raise
    finally:
        door.close()


@torch.no_grad()
def _answer(door: _Door, reward: Reward, stop: StopRequest) -> None:
    while door.members:
        for member in wait(list(door.members)):
            assert isinstance(member, Connection)
            request = _request(member, door.members[member])
            if request is None:
                door.leave(member)
                continue
            scores = {name: values.cpu() for name, values in reward.score(*request).items()}
            with suppress(ConnectionError):  # the next read of this connection says who is gone
                member.send_bytes(pickle.dumps((True, (scores, stop.requested))))


def _request(member: Connection, rank: int) -> tuple[Tensor, list[str]] | None:
    """Videos and prompts; None for a farewell."""
    try:
        request = pickle.loads(member.recv_bytes())
        if request is None:
            return None
        shape, prompts = request
        videos = torch.empty(shape, dtype=torch.uint8)
        member.recv_bytes_into(videos.view(-1).numpy())
    except (EOFError, ConnectionError):
        raise RewardProcessError(
            f"process {rank} ended before the run did, so the process of the reward model ends, too; the reason is "
            f"what process {rank} printed"
        ) from None
    return videos, prompts


class _Door:
    """Where the asking processes come in: ``members`` are those that are here, with their ranks."""

    def __init__(self, store: dist.Store, asking: int) -> None:
        family, host = _host_that_all_reach()
        self._socket = socket.create_server((host, 0), family=family, backlog=asking)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._coming, self._until = asking, time.monotonic() + _ARRIVAL
        self.members: dict[Connection, int] = {}
        store.set(_KEY, json.dumps([host, self._socket.getsockname()[1], self._token.hex()]))

    def admit_all(self) -> None:
        """RewardProcessError if one is missing ``_ARRIVAL`` seconds after the beginning."""
        while self._coming:
            if not wait([self._socket], max(0.0, self._until - time.monotonic())):
                raise RewardProcessError(
                    f"{self._coming} of the processes that train did not come to that of the reward model within "
                    f"{_ARRIVAL:g} s of its start; see what they printed"
                )
            self._admit(Connection(self._socket.accept()[0].detach()))

    def _admit(self, connection: Connection) -> None:
        """A stranger is turned away."""
        try:
            if not connection.poll(_INTRODUCTION):
                raise EOFError
            known = hmac.compare_digest(connection.recv_bytes(_TOKEN_BYTES), self._token)
            rank = pickle.loads(connection.recv_bytes()) if known else None
        except (EOFError, OSError):
            rank = None
        if rank is None:
            connection.close()
            return
        self.members[connection] = rank
        self._coming -= 1

    def tell(self, error: Exception) -> None:
        """Tell everyone of a failure, also those that are still to come."""
        news = pickle.dumps((False, portable(error), traceback.format_exc()))
        with suppress(RewardProcessError):
            self.admit_all()
        for member in self.members:
            with suppress(ConnectionError):
                member.send_bytes(news)
        # A connection that is closed on unread requests is reset, and the news lost: read until they leave.
        until = time.monotonic() + _FAREWELL
        while self.members and (here := wait(list(self.members), max(0.0, until - time.monotonic()))):
            for leaving in here:
                assert isinstance(leaving, Connection)
                try:
                    leaving.recv_bytes()
                except (EOFError, ConnectionError):
                    self.leave(leaving)

    def leave(self, member: Connection) -> None:
        del self.members[member]
        member.close()

    def close(self) -> None:
        self._socket.close()
        for member in list(self.members):
            self.leave(member)


def _host_that_all_reach() -> tuple[int, str]:
    """Address family and address of this machine as the others have it: from where it reaches the store's machine."""
    target = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "9"))
    family, *_, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return family, probe.getsockname()[0]
