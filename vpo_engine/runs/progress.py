"""The progress of a run, shown in the terminal."""

from __future__ import annotations

import math
import os
import statistics
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from vpo_engine.metrics.time_account import format_seconds
from vpo_engine.texts import printable, say

_TRAINING = "training"
"""The stage with which the first step begins."""
_OVERDUE = 2.0
"""A step that takes so many times as long as expected makes the time left unknown."""
_LONG_STAGE = 5.0
"""Seconds after which a stage is shown with the time that it has taken."""
_WIDE = 110
"""Columns from which on a terminal has place for a bar."""
_MOST_COLUMNS = 100
"""Longer lines of notes are wrapped, also on wider terminals."""
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

    It shows a line as soon as it is entered, and updates the time during long stages. A stage that lasts is shown with
    its own time. The time left is that of the remaining steps; nothing is said about it while a step takes twice as
    long as expected, and after the last step. On a terminal one line is redrawn in place; elsewhere a line is
    printed every ``plain_interval`` seconds if it differs from the one before. With ``enabled`` False, as in all
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
        self._trained = False
        self._numbers: list[str] = []
        self._printed = ""
        self._began = self._step_began = self._stage_began = clock()
        self._bar: tqdm | None = None
        self._ticker: threading.Thread | None = None
        self._leaving = threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> Progress:
        if not self._enabled:
            return self
        self._began = self._step_began = self._stage_began = self._clock()
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                file=self._stream,
                dynamic_ncols=_columns(self._stream) is not None,
                ncols=_FALLBACK_COLUMNS,
                bar_format=_bar_format(self._width),
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
            if name != self._stage:
                self._stage, self._stage_began = name, self._clock()
            if name == _TRAINING and not self._trained:  # what came before is no part of the first step
                self._trained, self._step_began = True, self._stage_began
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
        """Print lines above the progress line; they stay in the terminal, which wraps long ones between words."""
        if not self._enabled:
            return
        with self._lock:
            if self._bar is not None:
                self._bar.write(wrap_for(self._stream, printable(text)), file=self._stream)
            else:
                say(text, self._stream)

    def describe(self) -> str:
        """Return the progress line without counter and bar."""
        return ", ".join(self._parts())

    def _parts(self) -> list[str]:
        """Return the parts of the line, the most important one first."""
        now = self._clock()
        per_step, in_step, in_stage = (
            self._timer.seconds_per_step(),
            now - self._step_began,
            now - self._stage_began,
        )
        stage = self._stage
        if self._leaving.is_set():
            return [stage, f"after {format_seconds(now - self._began)}", *self._numbers]
        left = None
        if per_step is not None and self._done < self._total and in_step < _OVERDUE * per_step:
            seconds = (self._total - self._done - 1) * per_step + _rest_of_step(in_step, per_step)
            left = f"{format_seconds(seconds)} left" if seconds >= 1 else None
        if left is None or in_stage >= _LONG_STAGE:
            stage += f" for {format_seconds(in_stage)}"
        return [stage, *([left] if left else []), *self._numbers]

    @property
    def _width(self) -> int:
        """The columns that a line may have; the last one stays empty, or some terminals would go to the next line."""
        return (_columns(self._stream) or _FALLBACK_COLUMNS) - 1

    def _tick(self) -> None:
        while not self._leaving.wait(self._interval):
            self._show()

    def _show(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.bar_format = _bar_format(self._width)
                room = self._width - len(self._bar.bar_format.format(**_sizes(self._done, self._total)))
                self._bar.set_description_str(_as_many_as_fit(self._parts(), room))
                return
            line = f"step {self._done}/{self._total}: {self.describe()}"
            if line != self._printed:
                print(line, file=self._stream, flush=True)
                self._printed = line


def wrap_for(stream: TextIO, text: str) -> str:
    """Wrap the lines of ``text`` that are longer than the terminal ``stream`` is wide; words stay whole.

    For anything but a terminal return it as it is.
    """
    if not stream.isatty():
        return text
    width = min(_columns(stream) or _FALLBACK_COLUMNS, _MOST_COLUMNS) - 1
    lines = []
    for line in text.split("\n"):
        fits = len(line) <= width
        lines += (
            [line] if fits else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        )
    return "\n".join(lines)


def _rest_of_step(taken: float, expected: float) -> float:
    """Return the seconds that a step is expected to go on. They shrink slower and slower and never reach zero."""
    half = expected / 2
    return expected - taken if taken < half else half * math.exp(1 - taken / half)


def _bar_format(width: int) -> str:
    return "{n_fmt}/{total_fmt} |{bar:16}| {desc}" if width >= _WIDE else "{n_fmt}/{total_fmt}: {desc}"


def _sizes(done: int, total: int) -> dict[str, str | int]:
    """Return what takes the place of the fields of ``_bar_format`` when the description is empty."""
    return {"n_fmt": str(done), "total_fmt": str(total), "bar": "", "desc": ""}


def _as_many_as_fit(parts: Sequence[str], room: int) -> str:
    """Join the parts, without the last ones that do not fit; the first one is always there."""
    kept = list(parts)
    while len(kept) > 1 and len(", ".join(kept)) > room:
        kept.pop()
    return ", ".join(kept)


def _columns(stream: TextIO) -> int | None:
    """Return the width of a terminal; None for one without a size, as in containers, whose bar would be invisible."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def _numbers(metrics: Mapping[str, float]) -> list[str]:
    """Return the metrics of a train row that are shown. Right after a refresh there is no margin accuracy."""
    parts = []
    if "reward/selected" in metrics:
        parts.append(f"reward {metrics['reward/selected']:.3f}")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    if "margin" in metrics or "implicit_accuracy" in metrics:
        accuracy = metrics.get("implicit_accuracy")
        parts.append(f"margin accuracy {'n/a' if accuracy is None else f'{100 * accuracy:.0f} %'}")
    return parts
