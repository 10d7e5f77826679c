"""A reward model on a rank of its own in a run, which the other ranks find through the store of the process group.

Videos and scores pass over sockets, on one machine or between several. Who does not know the token that the store
holds is turned away.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait

import torch.distributed as dist

from vpo_engine.errors import RewardProcessError
from vpo_engine.protocols import Reward
from vpo_engine.rewards.remote import RemoteReward
from vpo_engine.rewards.server import answer_requests
from vpo_engine.rewards.wire import Wire, describe_error, wait_for
from vpo_engine.runs.signals import StopRequest

_KEY = "reward"
_ARRIVAL = 300.0
"""Seconds for all asking processes to connect."""
_INTRODUCTION = 5.0
"""Seconds for a process that has connected to say who it is."""
_FAREWELL = 10.0
"""Seconds for the asking processes to leave after a failure was told to them."""
_TOKEN_BYTES = 32
_HELLO_BYTES = 1024
"""The most that is read of a connection that has not yet shown the token."""


def find_reward(store: dist.Store, rank: int) -> RemoteReward:
    """Connect to the rank that serves the reward, as process ``rank``; returns before its model is loaded.

    To be used in a ``with`` block: leaving it says how this process ended.
    """
    host, port, token = json.loads(store.get(_KEY))
    wire = Wire(socket.create_connection((host, port)))
    wire.send("hello", {"token": token, "rank": rank})
    return RemoteReward(wire, _LastRank(wire), name=_KEY)


def serve(make: Callable[[], Reward], store: dist.Store, asking: int) -> signal.Signals | None:
    """Make a reward and score for ``asking`` processes that each ``find_reward``, until all have left.

    What making or scoring raises is told to all of them and raised. Raise RewardProcessError if one of them leaves
    by an error, dies, or does not come. A first SIGTERM or SIGINT is passed on to them; a second one is
    KeyboardInterrupt. Return the signal that was received, or None.
    """
    door = _Door(store, asking)
    try:
        reward = make()
        door.admit_all()
        with StopRequest() as stop:
            for member in door.members:
                member.send("ready", {"dimensions": list(reward.dimensions)})
            answer_requests(door.members, reward, lambda: stop.requested)
        return stop.signal
    except Exception as error:
        door.tell(error)
        raise
    finally:
        door.close()


class _LastRank:
    """The rank that serves the reward, as a ``Holder``; it ends by itself when all have left."""

    place = "the process of the reward model"

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def obituary(self, doing: str) -> str:
        return (
            f"{self.place} (that of the last rank) ended without a word while it {doing}; see what it printed, and "
            "whether the system killed it"
        )

    def kill(self) -> None:
        """Do nothing: the rank serves others, too."""

    def leave(self) -> None:
        self._wire.close()


class _Door:
    """The place where the asking processes come in: ``members`` are those that are here, with their names."""

    def __init__(self, store: dist.Store, asking: int) -> None:
        family, host = _host_that_all_reach()
        self._socket = socket.create_server((host, 0), family=family, backlog=asking)
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self._coming, self._until = asking, time.monotonic() + _ARRIVAL
        self.members: dict[Wire, str] = {}
        store.set(_KEY, json.dumps([host, self._socket.getsockname()[1], self._token]))

    def admit_all(self) -> None:
        """Let all in. Raise RewardProcessError if one is missing ``_ARRIVAL`` seconds after the beginning."""
        while self._coming:
            if not wait([self._socket], max(0.0, self._until - time.monotonic())):
                raise RewardProcessError(
                    f"{self._coming} of the processes that train did not come to that of the reward model within "
                    f"{_ARRIVAL:g} s of its start; see what they printed"
                )
            self._admit(Wire(self._socket.accept()[0]))

    def _admit(self, wire: Wire) -> None:
        """Let one in if it has the token; else turn it away."""
        try:
            hello = wire.receive(time.monotonic() + _INTRODUCTION, most=_HELLO_BYTES)
            token, rank = hello.field("token", str), hello.field("rank", int)
            known = hmac.compare_digest(token.encode(errors="replace"), self._token.encode())
        except (EOFError, OSError, RewardProcessError):
            known = False
        if not known:
            wire.close()
            return
        self.members[wire] = f"process {rank}"
        self._coming -= 1

    def tell(self, error: Exception) -> None:
        """Tell everyone of a failure, also those that are still to come."""
        with suppress(RewardProcessError):
            self.admit_all()
        for member in self.members:
            with suppress(ConnectionError):
                member.send("error", describe_error(error))
        # A connection that is closed on unread requests is reset, and the news lost: read until they leave.
        until = time.monotonic() + _FAREWELL
        while self.members and (here := wait_for(self.members, until - time.monotonic())):
            for leaving in here:
                try:
                    leaving.receive(until)
                except (EOFError, OSError):
                    self.members.pop(leaving)
                    leaving.close()

    def close(self) -> None:
        self._socket.close()
        for member in self.members:
            member.close()
        self.members.clear()


def _host_that_all_reach() -> tuple[int, str]:
    """Return address family and address of this machine as the others have it: those it reaches the store from."""
    target = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "9"))
    family, *_, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return family, probe.getsockname()[0]
