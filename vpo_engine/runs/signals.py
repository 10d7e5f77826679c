"""Stop a run on SIGTERM or SIGINT: at the next place where nothing is lost, and on a second signal at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopRequest:
    """A context in which SIGTERM and SIGINT only set ``requested``, which the run looks at.

    The first signal is acknowledged at once with the line that ``acknowledge`` returns; "" prints nothing. A second
    signal raises KeyboardInterrupt at once. Leaving the context restores the earlier handlers. Python delivers signals
    to the main thread, and entering in another thread raises ValueError.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, acknowledge: Callable[[str], str] = lambda name: "") -> None:
        """``acknowledge``: returns the line to print for a signal of this name."""
        self.signal: signal.Signals | None = None
        self._acknowledge = acknowledge
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
        if self.signal is not None:
            raise KeyboardInterrupt(f"{received.name} after {self.signal.name}")
        self.signal = received
        if line := self._acknowledge(received.name):
            os.write(2, f"\n{line}\n".encode())


def exit_code(received: signal.Signals) -> int:
    """Return the exit code of a program that ``received`` ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + received
