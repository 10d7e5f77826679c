"""Stop a run on SIGTERM or SIGINT: at the next place where nothing is lost, and on a second signal at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | None


_RELAYED = "TORCHELASTIC_RUN_ID"
"""A variable that torchrun sets. It passes on the signals that it receives, also those that a terminal sends to all of
its processes already."""
_ECHO = 5.0
"""Seconds in which a signal is taken for such a repetition."""


class StopRequest:
    """A context in which SIGTERM and SIGINT only set ``requested``, which the run looks at.

    The first signal is acknowledged at once with the line that ``acknowledge`` returns; "" prints nothing. A second
    signal raises KeyboardInterrupt at once (under torchrun not within five seconds, because torchrun repeats signals).
    Leaving the context restores the earlier handlers. Python delivers signals to the main thread, and entering in
    another thread raises ValueError.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, acknowledge: Callable[[str], str] = lambda name: "") -> None:
        """``acknowledge``: returns the line to print for a signal of this name."""
        self.signal: signal.Signals | None = None
        self._acknowledge = acknowledge
        self._received_at = 0.0
        self._earlier: dict[signal.Signals, _Handler] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in self.signals:
            self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        now = time.monotonic()
        if self.signal is not None:
            if _RELAYED in os.environ and now - self._received_at < _ECHO:
                return
            raise KeyboardInterrupt(f"{received.name} after {self.signal.name}")
        self.signal, self._received_at = received, now
        if line := self._acknowledge(received.name):
            os.write(2, f"\n{line}\n".encode())


def exit_code(received: signal.Signals) -> int:
    """Return the exit code of a program that ``received`` ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + received
