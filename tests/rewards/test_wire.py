"""Messages between processes: limits of time and of size hold for one message."""

from __future__ import annotations

import json
import socket
import struct
import time

import pytest

from vpo_engine.rewards.wire import Wire


def test_the_limit_of_a_message_holds_for_it_alone() -> None:
    """A stranger has seconds to say who it is; one that was let in may take minutes for its videos."""
    ours, theirs = map(Wire, socket.socketpair())
    for _ in range(2):
        theirs.send("hello")
    ours.receive(time.monotonic() + 60)
    assert ours._socket.gettimeout() is not None
    ours.receive()
    assert ours._socket.gettimeout() is None
    ours.send("score", deadline=time.monotonic() + 60)
    ours.send("refusals")
    assert ours._socket.gettimeout() is None
    ours.close()
    theirs.close()


def test_tensors_of_a_stranger_are_limited_as_its_header_is() -> None:
    ours, theirs = socket.socketpair()
    described = [{"name": "x", "dtype": "uint8", "shape": [4096]}]
    header = json.dumps({"kind": "hello", "fields": {}, "tensors": described}).encode()
    theirs.sendall(struct.pack("!QQ", len(header), 4096) + header + bytes(4096))
    with pytest.raises(ConnectionError, match="and 4096 bytes, expected at most 1024"):
        Wire(ours).receive(time.monotonic() + 60, most=1024)
    ours.close()
    theirs.close()
