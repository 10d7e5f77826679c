"""The progress of a run, shown in the terminal."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_SHOWN = {"reward/selected": "reward", "loss": "loss", "implicit_accuracy": "margin accuracy"}
"""The metrics that are shown: {name in the train rows: label in the terminal}."""
_WINDOW = 100
_OUTLIER = 5.0
_FALLBACK_COLUMNS = 120


class StepTimer:
    """Estimates the time left from the durations of the finished steps.

    The estimate is the mean of the last hundred durations, each limited to five times their median. So an evaluation
    now and then counts, and a laptop that was closed for a night does not. The first step includes warm-up, so it
    counts only as long as it is the only one.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._first: float | None = None

    def add(self, seconds: float) -> None:
        if self._first is None:
            self._first = seconds
        else:
            self._durations.append(seconds)

    def seconds_per_step(self) -> float | None:
        """Return the estimate; None until a step has finished."""
        if not self._durations:
            return self._first
        limit = _OUTLIER * statistics.median(self._durations)
        return statistics.fmean(min(seconds, limit) for seconds in self._durations)


class Progress:
    """Shows the current stage, finished steps, remaining time, reward, loss and margin accuracy of a run.

    It shows a line as soon as it is entered, and updates the time during long stages. On a terminal one line is
    redrawn in place; elsewhere a line is printed every ``plain_interval`` seconds. With ``enabled`` False, as in all
    processes but the first, it shows nothing.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        plain_interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must lie in 0..{total_steps} (total_steps), got {start_step}")
        self._total, self._done = total_steps, start_step
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._interval = 1.0 if self._stream.isatty() else plain_interval
        self._clock = clock
        self._timer = StepTimer()
        self._stage = "starting"
        self._numbers = ""
        self._began = self._step_began = clock()
        self._bar: tqdm | None = None
        self._ticker: threading.Thread | None = None
        self._leaving = threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> Progress:
        if not self._enabled:
            return self
        self._began = self._step_began = self._clock()
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                file=self._stream,
                dynamic_ncols=_knows_its_width(self._stream),
                ncols=_FALLBACK_COLUMNS,
                bar_format="{n_fmt}/{total_fmt} |{bar:16}| {desc}",
            )
        self._show()
        self._ticker = threading.Thread(target=self._tick, name="vpo-progress", daemon=True)
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._ticker is not None:
            self._ticker.join()
            self._stage = "done" if kind is None and self._done == self._total else "stopped"
            self._show()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def stage(self, name: str) -> None:
        """Set the stage that is shown from now on."""
        with self._lock:
            self._stage = name
            if self._bar is not None:
                self._show()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are finished; ``metrics`` is the train row of the last one."""
        with self._lock:
            now = self._clock()
            self._timer.add(now - self._step_began)
            self._step_began = now
            self._done = step
            self._numbers = _numbers(metrics)
            if self._bar is not None:
                self._bar.n = step
                self._show()

    def note(self, text: str) -> None:
        """Print a line above the progress line; it stays in the terminal."""
        if not self._enabled:
            return
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    def describe(self) -> str:
        """Return the progress line without counter and bar."""
        now = self._clock()
        per_step = self._timer.seconds_per_step()
        if per_step is None:
            time_text = f"measuring, {format_seconds(now - self._began)} so far"
        else:
            left = (self._total - self._done) * per_step
            in_step = min(now - self._step_began, per_step) if self._done < self._total else 0.0
            time_text = (
                f"{format_seconds(left - in_step)} left"
                if left > 0
                else f"after {format_seconds(now - self._began)}"
            )
        return ", ".join(part for part in (self._stage, time_text, self._numbers) if part)

    def _tick(self) -> None:
        while not self._leaving.wait(self._interval):
            self._show()

    def _show(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.set_description_str(self.describe())
            else:
                print(f"step {self._done}/{self._total}: {self.describe()}", file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """Format a duration: 4 s, 2 min 05 s, 3 h 07 min, 2 d 03 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def _knows_its_width(stream: TextIO) -> bool:
    """Return False for terminals without a size, as in containers, where a bar of zero columns would be invisible."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


def _numbers(metrics: Mapping[str, float]) -> str:
    parts = []
    for name, label in _SHOWN.items():
        if name in metrics:
            value = metrics[name]
            parts.append(
                f"{label} {100 * value:.0f} %" if name == "implicit_accuracy" else f"{label} {value:.3f}"
            )
    return ", ".join(parts)
