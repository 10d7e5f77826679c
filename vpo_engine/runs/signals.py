"""Stop a run on SIGTERM or SIGINT: the first one after the current step, the second one at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopRequest:
    """A context in which SIGTERM and SIGINT only set ``requested``, which the training loop checks after each step.

    A second signal raises KeyboardInterrupt at once. Leaving the context restores the earlier handlers. Python
    delivers signals to the main thread, and entering in another thread raises ValueError.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._earlier: dict[signal.Signals, _Handler] = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

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
        name = signal.Signals(number).name
        if self.requested:
            raise KeyboardInterrupt(
                f"{name} after {self.signal_name}: the run stops without finishing the step"
            )
        self.signal_name = name
