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


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


class RunningClock:
    """A clock that goes on by a second each time it is looked at."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_something_is_shown_at_once_and_while_nothing_happens():
    stream = io.StringIO()
    with Progress(48, stream=stream, plain_interval=0.02, clock=RunningClock()) as progress:
        assert stream.getvalue() == "step 0/48: starting for 1 s\n"
        progress.stage("rollout")
        wait_until(lambda: stream.getvalue().count("rollout") >= 2)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 4
    assert re.fullmatch(r"step 0/48: rollout for \d+ s", lines[2])
    assert lines[-1].startswith("step 0/48: stopped, ")


def test_no_line_is_printed_twice_in_a_row():
    stream, clock = io.StringIO(), Clock()
    with Progress(48, stream=stream, plain_interval=0.01, clock=clock) as progress:
        time.sleep(0.1)
        progress.stage("rollout")
        wait_until(lambda: "rollout" in stream.getvalue())
        time.sleep(0.1)
    assert stream.getvalue().splitlines() == [
        "step 0/48: starting for 0 s",
        "step 0/48: rollout for 0 s",
        "step 0/48: stopped, after 0 s",
    ]


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
    assert progress.describe() == "starting for 0 s"
    clock.now += 100
    progress.stage("training")
    for step in (1, 2, 3):
        clock.now += 10
        progress.step(step, {})
    progress.stage("text")
    progress.stage("training")
    assert progress.describe() == "training, 1 min 10 s left", (
        "what comes before the first step does not count"
    )
    clock.now += 4
    assert progress.describe() == "training, 1 min 06 s left"
    clock.now += 2
    assert progress.describe() == "training for 6 s, 1 min 04 s left"


def test_the_time_left_never_stands_still_or_ends_while_work_goes_on():
    clock = Clock()
    progress = Progress(4, clock=clock, stream=io.StringIO())
    progress.stage("training")
    for step in (1, 2, 3):
        clock.now += 1000
        progress.step(step, {})
    progress.stage("text")
    progress.stage("training")
    shown = []
    for _ in range(300):
        clock.now += 10
        shown.append(progress.describe())
    assert len(set(shown)) == len(shown)
    assert not any(" 0 s left" in line for line in shown)
    assert shown[49] == "training for 8 min 20 s, 8 min 20 s left"
    assert shown[99] == "training for 16 min 40 s, 3 min 04 s left"
    assert shown[198] == "training for 33 min 10 s, 25 s left"
    assert shown[199] == "training for 33 min 20 s", "twice as long as expected"
    progress.step(4, {})
    progress.stage("evaluating the trained policy")
    clock.now += 90
    assert progress.describe() == "evaluating the trained policy for 1 min 30 s"


def test_right_after_a_refresh_there_is_no_margin_accuracy():
    progress = Progress(4, clock=Clock(), stream=io.StringIO())
    progress.step(1, {"reward/selected": 4.5, "loss": 0.6931, "margin": 0.0})
    assert progress.describe().endswith("reward 4.500, loss 0.693, margin accuracy n/a")
    progress.step(2, {"reward/selected": 4.5, "tie_rate": 1.0})
    assert progress.describe().endswith("reward 4.500"), "a step without pairs has no loss either"


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


def shown_on_a_terminal(columns, show):
    """Return what ``show(progress)`` writes to a pseudo-terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w") as stream, Progress(4, stream=stream) as progress:
        show(progress)
    written = b""
    with suppress(OSError):  # EIO: the other end is closed and all of it was read
        while part := os.read(master, 65536):
            written += part
    os.close(master)
    return written.decode()


@pytest.mark.parametrize("columns", [0, 60, 80, 200])
def test_a_real_terminal_of_any_width_shows_the_line(columns):
    """Zero columns is what a terminal in a container says. Parts for which there is no place are left out whole."""

    def show(progress):
        progress.stage("rollout")
        progress.step(4, METRICS)

    shown = shown_on_a_terminal(columns, show)
    assert "4/4" in shown
    assert "rollout for 0 s, reward 4.567" in shown
    assert ("margin accuracy 55 %" in shown) == (columns != 60)
    lines = re.split(r"[\r\n]+", shown)
    assert max(len(line.rstrip()) for line in lines) < (columns or 120)
    assert not any(line.rstrip().endswith("margin") for line in lines)
    assert ("|" in shown) == (columns not in (60, 80)), "a bar, where there is place for it"


def test_notes_are_wrapped_between_words_on_a_terminal_only():
    path = "/a/path/" + 90 * "x"
    text = f"{30 * 'word '}\nreport: {path}\n a   table"
    lines = re.split(r"[\r\n]+", shown_on_a_terminal(80, lambda progress: progress.note(text)))
    words = [line for line in lines if line.startswith("word")]
    assert " ".join(words).split() == 30 * ["word"]
    assert max(map(len, words)) < 80
    assert path in lines
    assert " a   table" in lines
    stream = io.StringIO()
    with Progress(3, stream=stream) as progress:
        progress.note(text)
    assert f"{text}\n" in stream.getvalue()
