"""The server of a reward model: its process answers requests for scores until all that ask have left.

Run as a module it is the child process that ``process.py`` starts, with the number of an inherited socket and the id
of its parent as arguments; a first message describes the reward to make.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vpo_engine.errors import RewardProcessError
from vpo_engine.protocols import Reward
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.registry import RewardSpec
from vpo_engine.rewards.wire import Message, Wire, describe_error, wait_for


class AskerLostError(RewardProcessError):
    """A process that asks for scores has ended without a farewell."""


@torch.no_grad()
def answer_requests(members: dict[Wire, str], reward: Reward, stopping: Callable[[], bool]) -> None:
    """Answer what ``members`` ask for, one request after the other; who leaves is taken out of ``members``.

    They ask for scores of videos, or which prompts the reward refuses.

    ``members`` maps each connection to the name of its process. What the reward raises is raised here, and answered by
    the caller. Raise AskerLostError where a process ends without a farewell. ``stopping`` is asked after every score,
    and its answer sent with it.
    """
    while members:
        for member in wait_for(members):
            request = _receive(member, members[member])
            if request.kind == "farewell":
                del members[member]
                member.close()
                continue
            kind, fields, tensors = _answer(request, reward, stopping)
            with suppress(ConnectionError):  # the next read of this connection says who is gone
                member.send(kind, fields, tensors)


def _answer(
    request: Message, reward: Reward, stopping: Callable[[], bool]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return kind, fields and tensors of the answer to a request."""
    if request.kind == "refusals":
        return "refused", {"refused": list(refusals(reward, request.texts("prompts")).items())}, {}
    if request.kind == "size":
        size = request.field("size", list)
        if len(size) != 3 or not all(isinstance(each, int) for each in size):
            raise RewardProcessError(f"a size of videos must be three whole numbers, got {str(size)[:100]}")
        return "size", {"reason": size_refusal(reward, *size)}, {}
    videos, prompts = request.tensors.get("videos"), request.texts("prompts")
    if request.kind != "score" or videos is None:
        raise RewardProcessError(
            f"a request {request.kind[:40]!r} of a reward's process asks for nothing that it does; let both sides run "
            "the same version of vpo-engine"
        )
    scores = reward.score(videos, prompts)
    return "scores", {"stopping": stopping()}, scores


def _receive(member: Wire, name: str) -> Message:
    try:
        return member.receive()
    except (EOFError, ConnectionError):
        raise AskerLostError(
            f"{name} ended before the run did, so the process of the reward model ends, too; the reason is what "
            f"{name} printed"
        ) from None


def main(descriptor: int, parent: int) -> None:
    """Make the reward that the first message describes, then score until the parent closes the connection."""
    faulthandler.enable(all_threads=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    wire = Wire(socket.socket(fileno=descriptor))
    with suppress(EOFError, ConnectionError, AskerLostError):  # the parent has closed the connection
        reward = _make(wire)
        members = {wire: "the parent"}
        while reward is not None and members:
            try:
                answer_requests(members, reward, lambda: False)
            except AskerLostError:
                raise
            except Exception as error:
                wire.send("error", describe_error(error))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and libraries take seconds to leave


def _make(wire: Wire) -> Reward | None:
    """Make the reward and tell its dimensions, or else the error."""
    request = wire.receive()
    try:
        torch.set_num_threads(request.field("threads", int))
        torch.set_float32_matmul_precision(request.field("matmul_precision", str))
        reward = RewardSpec.from_fields(request.field("reward", dict)).build()
    except Exception as error:
        wire.send("error", describe_error(error))
        return None
    wire.send("ready", {"dimensions": list(reward.dimensions)})
    return reward


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, also in the middle of a score."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
