"""Run tests on hostile examples that hypothesis makes, within limits of time, memory and writing.

    @fuzz(text=st.text())
    def test_prompt_files_are_read_or_refused(folder, text):
        (folder / "prompts.txt").write_text(text)
        with clear_errors():
            read_prompts(folder / "prompts.txt")

Examples are the same in every run, and come in the same order; time decides only how many of them run. So a short run
finds nothing that a longer one on the same code has not found. All tests of a file together take one second, or what
VPO_FUZZ_SECONDS says:

    VPO_FUZZ_SECONDS=600 pytest tests/fuzz/test_NAME.py

Hypothesis prints the example that failed, made as small as it can be. Of a hang or an escape, which it lets through at
once, the error has a note with the example as it was.
"""

from __future__ import annotations

import faulthandler
import functools
import inspect
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(
    Path(tempfile.gettempdir()) / f"hypothesis-{os.getuid()}"
)  # nothing is left in the tree

EXAMPLE_SECONDS = 300.0
"""The most that one example may take; more is a hang. Hardly any takes a second, but a machine can be busy with other
things."""
_BUSY_SECONDS = 20.0
"""The most processor time that one example may take, however busy the machine is."""
EXAMPLE_BYTES = 2 << 30
"""How much address space one example may take beside what the process has."""
_EXAMPLES_PER_ROUND = 200
_MERCY = 20.0
"""Seconds after which a hang that no signal interrupts, in a C library, ends the process with a traceback."""
_tests_of_file: Counter[str] = Counter()


class HangError(BaseException):
    """An example took longer than it may. No ``except Exception`` of the product catches this."""


class EscapeError(BaseException):
    """An example wrote outside of its folder, started a process, or ran code of its folder."""


def fuzz(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Call the test with examples of the strategies until its share of the time is over.

    A test that has a parameter ``folder`` gets an empty folder per example, and may write there and nowhere else. Other
    parameters are fixtures, made once.
    """

    def decorate(check: Callable[..., None]) -> Any:
        file = check.__module__
        _tests_of_file[file] += 1
        parameters = inspect.signature(check).parameters
        fixtures = [name for name in parameters if name not in strategies and name != "folder"]

        @functools.wraps(check)
        def test(fuzz_seconds: float, tmp_path: Path, **made: Any) -> None:
            total = float(os.environ.get("VPO_FUZZ_SECONDS", fuzz_seconds))
            made = {name: made.get(name, tmp_path) for name in fixtures}
            _run_rounds(
                check, strategies, made, tmp_path, "folder" in parameters, total / _tests_of_file[file]
            )

        names = dict.fromkeys(["fuzz_seconds", "tmp_path", *fixtures])
        test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        return pytest.mark.parametrize("fuzz_seconds", [pytest.param(1.0, id="short")])(test)

    return decorate


@contextmanager
def clear_errors(*others: type[Exception], naming: str = "") -> Iterator[None]:
    """Accept a ValueError, or one of ``others``, with a message of one paragraph that says what to do.

    A subclass that Python or a library raises by itself, such as UnicodeDecodeError, is no clear error. ``naming``:
    what the message must contain, such as the file's name.
    """
    try:
        yield
    except (ValueError, *others) as error:
        text = str(error)
        ours = type(error) in (ValueError, *others) or type(error).__module__.startswith("vpo_engine.")
        if not ours or len(text) < 20 or "Traceback" in text or "\n\n" in text or naming not in text:
            raise AssertionError(f"no clear error: {type(error).__name__}: {text!r}") from error


@contextmanager
def limits(folder: Path | None) -> Iterator[None]:
    """Fail a block that hangs, takes much memory, writes outside of ``folder`` or runs code that lies there."""
    with _time_limit(), _memory_limit(), _no_escape(folder):
        yield


def _run_rounds(
    check: Callable[..., None],
    strategies: dict[str, Any],
    made: dict[str, Any],
    parent: Path,
    wants_folder: bool,
    seconds: float,
) -> None:
    until = time.monotonic() + seconds
    state = {"failed": False, "count": 0}

    def example(**drawn: Any) -> None:
        if time.monotonic() > until and not state["failed"] and state["count"]:
            return
        state["count"] += 1
        folder = parent / "example"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            with limits(folder):
                check(**made, **drawn, **({"folder": folder} if wants_folder else {}))
        except hypothesis.errors.UnsatisfiedAssumption:
            raise
        except BaseException as error:
            state["failed"] = True
            if not isinstance(error, Exception):
                error.add_note(f"the example: {drawn!r}")
            raise

    number = 0
    while number == 0 or time.monotonic() < until:
        chosen = hypothesis.settings(
            max_examples=_EXAMPLES_PER_ROUND,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        hypothesis.seed(number)(chosen(hypothesis.given(**strategies)(_named(example, strategies))))()
        number += 1


def _named(example: Callable[..., None], strategies: dict[str, Any]) -> Callable[..., None]:
    """Return a function of its own for hypothesis, which wants the names of the arguments in the signature."""

    def run(**drawn: Any) -> None:
        example(**drawn)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in strategies]
    )
    return run


@contextmanager
def _time_limit() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise HangError(
            f"an example took longer than {EXAMPLE_SECONDS:g} s, or {_BUSY_SECONDS:g} s of processor time"
        )

    timers = {
        signal.SIGALRM: (signal.ITIMER_REAL, EXAMPLE_SECONDS),
        signal.SIGPROF: (signal.ITIMER_PROF, _BUSY_SECONDS),
    }
    before = {number: signal.signal(number, end) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    faulthandler.dump_traceback_later(EXAMPLE_SECONDS + _MERCY, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Let allocations fail that would take EXAMPLE_BYTES more, whether or not their pages are ever touched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + EXAMPLE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_WRITES = {"os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1}
"""Audit events that change files, with how many of their arguments are paths."""
_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


class _Guard:
    """An audit hook, which Python cannot remove again: it looks at events only while ``folder`` is set."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.escape: str | None = None
        self._installed = False

    def install(self) -> None:
        if not self._installed:
            sys.addaudithook(self._look)
            self._installed = True

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        fault = self._fault(event, arguments)
        if fault is not None:
            self.escape = fault
            raise EscapeError(fault)

    def _fault(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, mode, flags = arguments
            writes = (
                any(letter in mode for letter in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))
            )
            return f"wrote {path!r}" if writes and self._outside(path) else None
        if event in _WRITES:
            outside = [path for path in arguments[: _WRITES[event]] if self._outside(path)]
            return f"{event} of {outside}" if outside else None
        if (
            event in ("os.remove", "os.rmdir") and arguments[1] == -1
        ):  # else of a folder that is open, as rmtree does
            return f"{event} of {arguments[0]!r}" if self._outside(arguments[0]) else None
        if event in _PROCESSES:
            return f"started a process: {event} {arguments!r}"
        if event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            return f"ran code of {file}" if str(file).startswith(f"{self.folder}{os.sep}") else None
        return None

    def _outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.fsdecode(path))
        allowed = (f"{self.folder}{os.sep}", "/dev/null", "/proc/self/")
        return real != self.folder and not real.startswith(allowed) and "__pycache__" not in real


_guard = _Guard()


@contextmanager
def trusted() -> Iterator[None]:
    """Let a test itself, within an example, start a process or write elsewhere."""
    folder, _guard.folder = _guard.folder, None
    try:
        yield
    finally:
        _guard.folder = folder


@contextmanager
def _no_escape(folder: Path | None) -> Iterator[None]:
    _guard.install()
    _guard.folder, _guard.escape = None if folder is None else os.path.realpath(folder), None
    try:
        yield
    finally:
        _guard.folder = None
    if _guard.escape is not None:  # what caught the error on its way goes on, but the test does not
        raise EscapeError(_guard.escape)


def flip(content: bytes, places: list[tuple[int, int]]) -> bytes:
    """Return the bytes with some exchanged: (position modulo the length, new value)."""
    changed = bytearray(content)
    for place, value in places:
        if changed:
            changed[place % len(changed)] = value
    return bytes(changed)


def remove(path: Path) -> None:
    """Delete a file that may not exist."""
    with suppress(FileNotFoundError):
        path.unlink()
