import fcntl
import io
import os
import pty
import re
import struct
import termios
import time
from contextlib import suppress

import pytest

from vpo_engine.runs.progress import Progress, StepTimer, format_seconds

METRICS = {"reward/selected": 4.567, "loss": 0.6931, "implicit_accuracy": 0.55, "lr": 1e-5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_something_is_shown_at_once_and_while_nothing_happens():
    stream = io.StringIO()
    with Progress(48, stream=stream, plain_interval=0.02) as progress:
        assert stream.getvalue() == "step 0/48: starting, measuring, 0 s so far\n"
        progress.stage("rollout")
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 4
    assert lines[2].startswith("step 0/48: rollout, measuring, ")
    assert lines[-1].startswith("step 0/48: stopped, ")


def test_plain_lines_come_every_few_seconds_not_every_step():
    stream = io.StringIO()
    with Progress(1000, stream=stream, plain_interval=60) as progress:
        for step in range(1, 1001):
            progress.stage("update")
            progress.step(step, METRICS)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1] == "step 1000/1000: done, after 0 s, reward 4.567, loss 0.693, margin accuracy 55 %"


def test_a_terminal_shows_one_line_with_everything():
    stream, clock = Terminal(), Clock()
    with Progress(48, 10, stream=stream, clock=clock) as progress:
        progress.stage("rollout")
        clock.now = 10.0
        progress.step(11, METRICS)
        progress.stage("decode")
    last = stream.getvalue().split("\r")[-2]
    assert "10/48" in stream.getvalue().split("\r")[1]
    assert "decode, 6 min 10 s left, reward 4.567, loss 0.693, margin accuracy 55 %" in stream.getvalue()
    assert "11/48" in last
    assert "stopped" in last


def test_time_left_counts_down_within_a_step():
    clock = Clock()
    progress = Progress(10, clock=clock, stream=io.StringIO())
    assert progress.describe() == "starting, measuring, 0 s so far"
    for step in (1, 2, 3):
        clock.now += 10
        progress.step(step, {})
    assert progress.describe() == "starting, 1 min 10 s left"
    clock.now += 4
    assert progress.describe() == "starting, 1 min 06 s left"
    clock.now += 100
    assert progress.describe() == "starting, 1 min 00 s left"


def test_the_estimate_is_robust():
    timer = StepTimer()
    assert timer.seconds_per_step() is None
    timer.add(300.0)
    assert timer.seconds_per_step() == 300.0
    for _ in range(19):
        timer.add(2.0)
    assert timer.seconds_per_step() == 2.0
    timer.add(6.0)
    assert timer.seconds_per_step() == pytest.approx(2.2)
    timer.add(1e6)
    assert timer.seconds_per_step() == pytest.approx((19 * 2 + 6 + 10) / 21)


def test_notes_stay():
    for stream in (io.StringIO(), Terminal()):
        with Progress(3, stream=stream) as progress:
            progress.note("saved checkpoint 12")
        assert "saved checkpoint 12\n" in stream.getvalue()


def test_other_processes_are_silent():
    stream = io.StringIO()
    with Progress(3, enabled=False, stream=stream, plain_interval=0.01) as progress:
        progress.stage("rollout")
        progress.step(1, METRICS)
        progress.note("hello")
        time.sleep(0.03)
    assert stream.getvalue() == ""


def test_an_error_passes_through_and_the_display_ends():
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="boom"), Progress(3, stream=stream):
        raise RuntimeError("boom")
    assert re.search(r"step 0/3: stopped, ", stream.getvalue())


def test_a_start_beyond_the_end():
    with pytest.raises(ValueError, match=r"start_step must lie in 0\.\.3 \(total_steps\), got 4"):
        Progress(3, 4)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (11220, "3 h 07 min"),
        (183600, "2 d 03 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("columns", [0, 60, 200])
def test_a_real_terminal_of_any_width_shows_the_line(columns):
    """Zero columns is what a terminal in a container says."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w") as stream, Progress(4, stream=stream) as progress:
        progress.stage("rollout")
        progress.step(4, METRICS)
    written = b""
    with suppress(OSError):  # EIO: the other end is closed and all of it was read
        while part := os.read(master, 65536):
            written += part
    os.close(master)
    shown = written.decode()
    assert "4/4" in shown
    assert "rollout, after 0 s" in shown
