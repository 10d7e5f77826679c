"""The protocol of rewards in other processes, both sides, when the other side sends anything."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import torch
from fuzz_driver import clear_errors, fuzz
from hypothesis import strategies as st
from torch import Tensor

from vpo_engine.errors import RewardProcessError
from vpo_engine.rewards.remote import RemoteReward
from vpo_engine.rewards.server import answer_requests
from vpo_engine.rewards.wire import Wire

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64, 1.5, None, "2"])
DTYPES = st.sampled_from(
    ["uint8", "float32", "float64", "bool", "complex64", "quint8", "load", "", None, 3, "bits8"]
)
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["videos", "quality", "", "x"]) | VALUES,
        "dtype": DTYPES,
        "shape": st.lists(NUMBERS, max_size=6),
    }
)
FILES = st.fixed_dictionaries(
    {
        "name": st.just("videos"),
        "file": st.fixed_dictionaries({"path": VALUES, "shape": st.lists(NUMBERS, max_size=6), "fps": VALUES})
        | VALUES,
    }
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "prompts": st.lists(st.text(max_size=3), max_size=3) | VALUES,
        "size": st.lists(NUMBERS, max_size=4) | VALUES,
        "dimensions": st.just(["quality"]) | VALUES,
        "stopping": VALUES,
        "refused": st.lists(st.tuples(NUMBERS, VALUES), max_size=2) | VALUES,
        "reason": VALUES,
        "type": st.sampled_from(["ValueError", "SystemExit", "UnicodeDecodeError", "Popen", "KeyError"])
        | VALUES,
        "module": st.sampled_from(["builtins", "subprocess", "vpo_engine.errors"]) | VALUES,
        "arguments": st.lists(VALUES, max_size=5) | VALUES,
        "text": VALUES,
        "trace": VALUES,
    },
)
KINDS = (
    st.sampled_from(["score", "scores", "refusals", "refused", "size", "farewell", "ready", "error", "x"])
    | VALUES
)
MESSAGES = st.fixed_dictionaries(
    {"kind": KINDS, "fields": FIELDS | VALUES, "tensors": st.lists(TENSORS | FILES, max_size=3) | VALUES}
)


@st.composite
def sent(draw: Any) -> bytes:
    """Return the bytes of a message, whose lengths are mostly the true ones."""
    header = draw(st.binary(max_size=30) | (MESSAGES | VALUES).map(lambda value: json.dumps(value).encode()))
    body = draw(st.binary(max_size=64))
    lengths = draw(
        st.just((len(header), len(body)))
        | st.tuples(NUMBERS, NUMBERS).map(
            lambda pair: tuple(n % 2**64 if isinstance(n, int) else 7 for n in pair)
        )
    )
    cut = draw(st.none() | st.integers(0, 60))
    return (struct.pack("!QQ", *lengths) + header + body)[:cut]


class Quality:
    """A reward that looks at all that it is given."""

    dimensions = ("quality",)

    def score(self, videos: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        if not isinstance(videos, Tensor) or videos.ndim != 5 or len(videos) != len(prompts):
            raise ValueError(
                f"{type(videos).__name__} for {len(prompts)} prompts is refused here; give five dimensions"
            )
        return {"quality": videos.float().flatten(1).mean(dim=1) + len(prompts)}


class Nobody:
    """A holder without a process."""

    place = "the process of the reward"

    def obituary(self, doing: str) -> str:
        return f"{self.place} ended while it {doing}; start it again"

    def kill(self) -> None: ...

    def leave(self) -> None: ...


def connected(*messages: bytes) -> Wire:
    """Return a connection on which these messages have arrived, and then its end."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"".join(messages))
    theirs.shutdown(socket.SHUT_WR)
    theirs.setblocking(False)
    _kept.append(theirs)
    del _kept[:-1]
    return Wire(ours)


_kept: list[socket.socket] = []
"""The other end, which takes what is answered."""


@fuzz(message=sent())
def test_what_arrives_is_a_message_or_a_lost_connection(message: bytes) -> None:
    wire = connected(message)
    try:
        found = wire.receive(time.monotonic() + 5)
    except (EOFError, ConnectionError):
        return
    finally:
        wire.close()
    assert isinstance(found.kind, str)


@fuzz(messages=st.lists(sent(), min_size=1, max_size=2))
def test_the_server_answers_or_says_what_is_wrong(messages: list[bytes]) -> None:
    wire = connected(*messages)
    with clear_errors(RewardProcessError):
        answer_requests({wire: "process 0"}, Quality(), lambda: False)
    wire.close()


@fuzz(
    answers=st.lists(sent(), max_size=2),
    question=st.sampled_from(["score", "refusals", "size"]),
    made=st.booleans(),
)
def test_the_asking_side_gets_scores_or_says_what_is_wrong(
    answers: list[bytes], question: str, made: bool
) -> None:
    ready = json.dumps({"kind": "ready", "fields": {"dimensions": ["quality"]}, "tensors": []}).encode()
    first = [struct.pack("!QQ", len(ready), 0) + ready] if made else []
    wire = connected(*first, *answers)
    reward = RemoteReward(wire, Nobody(), name="hostile", time_limit=5.0)
    files = len(os.listdir("/proc/self/fd"))
    try:
        if question == "score":
            reward.score(torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), ["x"])
        elif question == "refusals":
            assert all(isinstance(row, int) for row in reward.refusals(["x"]))
        else:
            assert isinstance(reward.refuse_size(2, 4, 4), str | None)
    except Exception as error:  # an error that was told of has the type that it was told of
        told = bool(getattr(error, "__notes__", ()))
        if not told:
            with clear_errors(RewardProcessError):
                raise
    finally:
        wire.close()
    assert len(os.listdir("/proc/self/fd")) <= files
