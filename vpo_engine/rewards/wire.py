"""Messages between a process that holds a reward model and the processes that ask it for scores.

A message is two lengths, a JSON header and raw bytes: the lengths are unsigned 64-bit integers, big-endian, and count
the bytes of the header (UTF-8) and of what follows it. The header has the message's kind, its fields, and the name,
dtype and shape of each tensor; the tensors' bytes follow in that order. A video file in place of a tensor is named in
the header, and read by who receives it, on the same machine. Nothing is pickled, errors included.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from vpo_engine.errors import RewardProcessError
from vpo_engine.rewards.videos import Videos

_LENGTHS = struct.Struct("!QQ")
_LARGEST_HEADER = 64 << 20
"""Bytes of the largest header that is read; a prompt takes some hundred."""
_PLAIN = (str, int, float, bool, type(None))
_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16", "float32", "float64")
"""Types of tensors that are sent."""


@dataclass(frozen=True)
class Message:
    """A message that has arrived."""

    kind: str
    fields: dict[str, Any]
    tensors: dict[str, Any]
    """Tensors, or video files in their place."""

    def field(self, name: str, kind: type) -> Any:
        """Return a field. Raise RewardProcessError where it is missing or is not of this kind."""
        found = self.fields.get(name)
        if not isinstance(found, kind):
            raise RewardProcessError(
                f"a message {self.kind[:40]!r} of the reward's process has no {kind.__name__} {name!r}; let both sides "
                "run the same version of vpo-engine"
            )
        return found

    def texts(self, name: str) -> list[str]:
        """Return a field that is a list of texts. Raise RewardProcessError where it is anything else."""
        found: list[str] = self.field(name, list)
        if not all(isinstance(each, str) for each in found):
            raise RewardProcessError(
                f"a message {self.kind[:40]!r} of the reward's process has other values than texts in {name!r}; let "
                "both sides run the same version of vpo-engine"
            )
        return found


class Wire:
    """A connected stream socket that carries whole messages, one at a time in each direction.

    A ``deadline`` is a time of ``time.monotonic`` at which sending or receiving raises TimeoutError; None waits for
    ever.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def poll(self, seconds: float) -> bool:
        """Wait until something has arrived or the other side has closed, at most ``seconds``; return whether it has."""
        return bool(wait_for([self], seconds))

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Videos] | None = None,
        deadline: float | None = None,
    ) -> None:
        """Send a message; tensors may be on any device. Raise ConnectionError where the other side is gone."""
        held, described = list[Tensor](), list[dict[str, Any]]()
        for name, videos in (tensors or {}).items():
            if not isinstance(videos, Tensor):
                described.append({"name": name, "file": videos.to_fields()})
                continue
            tensor = videos.detach().cpu().contiguous()
            held.append(tensor)
            described.append(
                {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            )
        header = json.dumps({"kind": kind, "fields": dict(fields or {}), "tensors": described}).encode()
        size = sum(tensor.nbytes for tensor in held)
        self._limit(deadline)
        self._socket.sendall(_LENGTHS.pack(len(header), size) + header)
        for tensor in held:
            self._limit(deadline)
            self._socket.sendall(_bytes_of(tensor))

    def receive(self, deadline: float | None = None, most: int | None = None) -> Message:
        """Return the next message, its tensors on the CPU.

        Raise EOFError where the other side has closed the connection, ConnectionError where it was lost, for bytes
        that are no message, for tensors that this machine has no memory for, and for more than ``most`` bytes of header
        or tensors.
        """
        lengths = bytearray(_LENGTHS.size)
        self._fill(memoryview(lengths), deadline)
        header_size, size = _LENGTHS.unpack(lengths)
        if most is not None and max(header_size, size) > most:
            raise ConnectionError(f"a message of {header_size} and {size} bytes, expected at most {most}")
        if header_size > _LARGEST_HEADER:
            raise ConnectionError(f"a header of {header_size} bytes, expected at most {_LARGEST_HEADER}")
        header = bytearray(header_size)
        self._fill(memoryview(header), deadline)
        try:
            content = json.loads(header)
            message = Message(
                str(content["kind"]), dict(content["fields"]), _allocated(content["tensors"], size)
            )
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
            raise ConnectionError(f"the header of a message cannot be read: {error!r}") from error
        for tensor in message.tensors.values():
            if isinstance(tensor, Tensor):
                self._fill(_bytes_of(tensor), deadline)
        return message

    def close(self) -> None:
        """Close the connection; a thread that waits in ``receive`` is woken."""
        with suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _limit(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _fill(self, buffer: memoryview, deadline: float | None) -> None:
        while buffer:
            self._limit(deadline)
            count = self._socket.recv_into(buffer)
            if not count:
                raise EOFError
            buffer = buffer[count:]


def wait_for(wires: Iterable[Wire], seconds: float | None = None) -> list[Wire]:
    """Wait until one of the connections has something to read or has ended; return those, none after ``seconds``."""
    wires_of = {wire._socket: wire for wire in wires}
    ready = wait(list(wires_of), None if seconds is None else max(0.0, seconds))
    return [wires_of[found] for found in ready if isinstance(found, socket.socket)]


def describe_error(error: Exception) -> dict[str, Any]:
    """Return an error as fields of a message: its type, what the type is called with, its text and its traceback."""
    reduced = error.__reduce__()
    assert isinstance(reduced, tuple)
    made_by, arguments = reduced[:2]
    fits = made_by is type(error) and all(isinstance(argument, _PLAIN) for argument in arguments)
    return {
        "module": type(error).__module__,
        "type": type(error).__qualname__,
        "arguments": list(arguments) if fits else None,
        "text": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def recreate_error(fields: Mapping[str, Any], place: str) -> Exception:
    """Make the error that ``describe_error`` described, with its traceback as a note that names ``place``.

    It has the same type and text. A type that this process does not know, or that cannot be made again from plain
    arguments, becomes a RuntimeError that names it. Fields that describe no error become a RewardProcessError.
    """
    words = [fields.get(name) for name in ("module", "type", "text", "trace")]
    if not all(isinstance(word, str) for word in words):
        return RewardProcessError(f"{place} told of an error without saying which; see what it printed")
    error = _of_its_type(fields) or RuntimeError(f"{fields['type']}: {fields['text']}")
    error.add_note(f"in {place}:\n{fields['trace']}")
    return error


def _of_its_type(fields: Mapping[str, Any]) -> Exception | None:
    kind, arguments = (
        getattr(sys.modules.get(fields["module"]), fields["type"], None),
        fields.get("arguments"),
    )
    if not isinstance(arguments, list) or not (isinstance(kind, type) and issubclass(kind, Exception)):
        return None
    try:
        error = kind(*arguments)
    except Exception:  # a constructor may refuse in any way; the caller then names the type instead
        return None
    return error if str(error) == fields["text"] else None


def _allocated(described: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """Return empty tensors and video files as a header describes them.

    Raise ValueError unless the tensors have ``size`` bytes in all.
    """
    tensors = {
        str(each["name"]): torch.empty(each["shape"], dtype=_dtype(each["dtype"]), device="meta")
        for each in described
        if "file" not in each
    }
    if sum(tensor.nbytes for tensor in tensors.values()) != size:
        raise ValueError(f"{size} bytes of tensors, which it does not describe")
    files = {str(each["name"]): _file(each["file"]) for each in described if "file" in each}
    return files | {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}


def _file(fields: dict[str, Any]) -> Videos:
    from vpo_engine.runs.video_file import VideoFile  # PyAV is loaded where there are files

    return VideoFile.from_fields(fields)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{name!r} is no dtype that is sent")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of the memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    # A tensor of one element counts as contiguous whatever its stride, which the view of its bytes would take over.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
