"""Run every check that has waited for a GPU, in order of worth, on a machine that is lent for a short time.

    python bench/on_gpu.py --minutes 12 [--out FOLDER] [--only NAME ...]
    python bench/on_gpu.py --list                   # the checks, and what they need that is missing here
    python bench/on_gpu.py --out FOLDER --record    # write the rows of FOLDER to bench/results, and run nothing
    python bench/on_gpu.py --dry-run --minutes 1    # the same on any machine, with a second's sleep for each check

It needs no installation and no packages but torch, triton and transformers; a check that needs more is skipped and
says what. Each check is a process with a time limit of its own. Its result is in FOLDER/results.json as soon as it has
ended, so that a machine that is taken away leaves all finished checks. The same command goes on with the others:
only what passed or failed is not repeated, unless --only names it. The command ends within its minutes. The exit code
is 0 if nothing failed and 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpu_checks import CHECKS, CUDA, ROWS, Check, stand_in

State = Literal["passed", "failed", "skipped", "not reached", "running"]
FINISHED = ("passed", "failed")
ROOT = Path(__file__).parents[1]
MARK = "VPO_ON_GPU"
"""The environment variable by which a check's processes are found, in whatever session or group they are."""
PATIENCE = 2.0
"""A check is ended after its estimate times this."""
RESERVE, RESERVED_SHARE = 5.0, 0.05
"""Seconds kept free at the end, at most this share of all: for ending a check, saving, and the table."""
IMPORT_LIMIT = 60.0
"""Seconds that the imports of all packages may take together."""
TAIL = 6000


@dataclass
class Result:
    """The outcome of a check.

    code: exit code, negative for a signal; None if it did not end by itself. output: its last ``TAIL`` characters.
    rows: as ``rows.Row`` is written to a line of bench/results.
    """

    state: State = "not reached"
    reason: str = ""
    seconds: float = 0.0
    code: int | None = None
    output: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


class Results:
    """The results in a folder, by the name of their check; every change is on disk before the next check starts."""

    def __init__(self, folder: Path, dry_run: bool) -> None:
        """Read the results that are there. Raise ValueError where they cannot be read, or are of the other kind."""
        self.path, self.dry_run = folder / "results.json", dry_run
        self.found: dict[str, Result] = {}
        if not self.path.exists():
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.found = {name: Result(**one) for name, one in stored["results"].items()}
            dry = bool(stored["dry_run"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} does not hold results ({error!r}); move it away, or name another --out"
            ) from error
        for one in self.found.values():
            if one.state == "running":
                one.state, one.reason = "not reached", "it ran when the command was killed"
        if dry != dry_run:
            kind = "a dry run" if dry else "true checks"
            raise ValueError(
                f"{self.path} holds the results of {kind}, which must not mix; name another --out"
            )

    def keep(self, name: str, result: Result) -> None:
        """Set a result, and write all of them: to a file beside, which then takes the place of the old one."""
        self.found[name] = result
        everything = {name: dataclasses.asdict(one) for name, one in self.found.items()}
        beside = self.path.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"dry_run": self.dry_run, "results": everything}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def finished(self, name: str) -> bool:
        return name in self.found and self.found[name].state in FINISHED


class Runner:
    """Runs checks one after the other until the time is up. ``until``: on the clock of ``time.monotonic``."""

    def __init__(self, folder: Path, results: Results, until: float) -> None:
        self._folder, self._results, self._until = folder, results, until
        self._rows, self._output = folder / "rows.tmp", folder / "output.tmp"
        self._mark = str(folder.resolve())
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            MARK: self._mark,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def left(self) -> float:
        return self._until - time.monotonic()

    def missing(self, symbols: Iterable[str]) -> dict[str, str]:
        """Return the symbols that cannot be imported here, with the reason; processes of their own try it.

        A symbol whose import ends the process, or does not return, is missing too.
        """
        waiting, answers = list(dict.fromkeys(symbols)), dict[str, str]()
        while waiting and self.left > 0:
            limit = min(IMPORT_LIMIT, self.left)
            code = self._run([str(ROOT / "bench" / "gpu_checks.py"), *waiting], limit)
            for line in self._output.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    symbol, reason = json.loads(line)
                    answers[symbol] = reason
            unanswered = [symbol for symbol in waiting if symbol not in answers]
            if unanswered:
                how = f"takes more than {limit:.0f} s" if code is None else f"ends in {ended_how(code)}"
                answers[unanswered[0]] = f"importing it {how}"
            waiting = unanswered[1:]
        return {symbol: reason for symbol, reason in answers.items() if reason}

    def run(self, check: Check, missing: dict[str, str]) -> Result:
        """Run a check that fits, and save its result."""
        lacking = [f"{need} ({missing[need]})" for need in check.needs if need in missing]
        if lacking:
            result = Result("skipped", f"needs {'; '.join(lacking)}")
        elif self.left <= 0:
            result = Result("not reached", "the time was up")
        elif check.seconds > self.left:
            result = Result("skipped", f"needs about {check.seconds:.0f} s, but {self.left:.0f} s were left")
        else:
            self._results.keep(check.name, Result("running"))
            result = self._measure(check)
        self._results.keep(check.name, result)
        return result

    def _measure(self, check: Check) -> Result:
        shutil.rmtree(self._rows, ignore_errors=True)
        self._rows.mkdir()
        limit, left, start = PATIENCE * check.seconds, self.left, time.monotonic()
        code = self._run([part.replace(ROWS, str(self._rows)) for part in check.command], min(limit, left))
        seconds = time.monotonic() - start
        if code is not None:
            state: State = "failed" if code else "passed"
            reason = ended_how(code) if code else ""
        elif limit <= left:
            state, reason = "failed", f"ended at its limit of {limit:.0f} s"
        else:
            state, reason = "skipped", f"ended after {seconds:.0f} s, because the time was up"
        output = self._output.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        try:
            rows = [json.loads(line) for file in sorted(self._rows.glob("*.jsonl")) for line in file.open()]
        except ValueError as error:
            state, reason, rows = "failed", f"its rows cannot be read: {error}", []
        return Result(state, reason, round(seconds, 2), code, output, rows)

    def _run(self, command: Sequence[str], limit: float) -> int | None:
        """Run Python with these arguments; return the exit code, or None if it ran over. Nothing of it is left."""
        with self._output.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end_processes()
            process.wait()

    def end_processes(self) -> None:
        """Kill all processes that have this folder's mark: those of a check, or of a call that was killed itself."""
        mark = f"{MARK}={self._mark}".encode()
        for _ in range(20):  # a process may start another one between the look and the kill
            found = list(_processes_with(mark))
            for number in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            if not found:
                return
            time.sleep(0.02)

    def clean(self) -> None:
        shutil.rmtree(self._rows, ignore_errors=True)
        self._output.unlink(missing_ok=True)


def _processes_with(mark: bytes) -> Iterator[int]:
    """Yield the processes, other than this one, that have ``mark`` in their environment (Linux)."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        number = int(entry.parent.name)
        with contextlib.suppress(OSError):
            if number != os.getpid() and mark in entry.read_bytes().split(b"\0"):
                yield number


def _end_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, even by SIGKILL (prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def ended_how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def chosen(checks: Sequence[Check], names: Sequence[str] | None) -> list[Check]:
    """Return the named checks, or all, in order of worth. Raise ValueError for a name that no check has."""
    known = [check.name for check in checks]
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no check {name!r}; --only takes of {', '.join(known)}")
    return [check for check in checks if not names or check.name in names]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second call off a folder. Raise ValueError if one is at work there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another call works in {folder}; wait for it, or name another --out") from None
    else:
        yield
    finally:
        os.close(descriptor)


def table(checks: Sequence[Check], results: Results) -> str:
    """Return a line for every check: state, seconds, where its result lies, and why if it did not pass."""
    lines = [("check", "state", "seconds", "result", "")]
    for check in checks:
        one = results.found.get(check.name, Result())
        ran = one.state in FINISHED or one.seconds
        where = f"{results.path}, {len(one.rows)} rows" if ran else ""
        lines.append((check.name, one.state, f"{one.seconds:.1f}" if ran else "", where, one.reason))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    )


def run_checks(checks: Sequence[Check], repeat: bool, runner: Runner, results: Results) -> bool:
    """Run the checks that are not finished, or all with ``repeat``; return whether all ended without a signal to us."""
    waiting = [check for check in checks if repeat or not results.finished(check.name)]
    for check in waiting:  # so that a machine that is taken away leaves the names of what it did not reach
        results.keep(check.name, Result())
    missing: dict[str, str] = {}
    try:
        missing = runner.missing(need for check in waiting for need in check.needs)
        for check in waiting:
            print(f"{check.name}: {check.why}", flush=True)
            result = runner.run(check, missing)
            print(
                f"    {result.state}{result.reason and ': '}{result.reason}; {max(0.0, runner.left):.0f} s left"
            )
    except KeyboardInterrupt:
        for check in waiting:
            if results.found[check.name].state == "running":
                results.keep(check.name, Result("not reached", "it ran when the command was stopped"))
        return False
    return True


def listed(checks: Sequence[Check], missing: dict[str, str]) -> str:
    lines = []
    for check in checks:
        lines.append(f"{check.name}, about {check.seconds:.0f} s: {check.why}")
        lines += [f"    needs {need}: {missing[need]}" for need in check.needs if need in missing]
    return "\n".join(lines)


def record_rows(results: Results) -> list[Path]:
    """Write all rows of the results to bench/results. Raise ValueError if there are none."""
    from rows import Environment, Row, record  # imports torch

    found = [row for result in results.found.values() for row in result.rows]
    if not found or results.dry_run:
        raise ValueError(f"{results.path} holds no measured rows; run checks with this --out first")
    return record(Row(**{**row, "environment": Environment(**row["environment"])}) for row in found)


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} minutes is no time; give a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, help="time in which the command ends")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "on_gpu",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="run these checks, again if they are finished"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the checks and what is missing, run nothing"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the rows of --out to bench/results, run nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="let a second's sleep stand in for each check")
    return parser


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    started, parser = time.monotonic(), _parser()
    given = parser.parse_args(arguments)
    try:
        asked = chosen(checks, given.only)
        if given.dry_run:
            asked = [stand_in(check) for check in asked]
        given.out.mkdir(parents=True, exist_ok=True)
        with locked(given.out):
            return _act(given, asked, started, parser)
    except ValueError as error:
        parser.error(str(error))


def _act(
    given: argparse.Namespace, checks: Sequence[Check], started: float, parser: argparse.ArgumentParser
) -> int:
    results = Results(given.out, given.dry_run)
    if given.record:
        print("recorded in", *record_rows(results))
        return 0
    if given.minutes is None and not given.list:
        parser.error("--minutes is missing: the time in which the command has to end, such as --minutes 12")
    seconds = 60 * (given.minutes or 10)
    reserve = min(RESERVE, RESERVED_SHARE * seconds)
    runner = Runner(given.out, results, started + seconds - reserve)
    runner.end_processes()
    try:
        if given.list:
            print(listed(checks, runner.missing(need for check in checks for need in check.needs)))
            return 0
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            undisturbed = run_checks(checks, bool(given.only), runner, results)
        finally:
            signal.signal(signal.SIGTERM, before)
    finally:
        runner.clean()
    print(table(checks, results))
    states = [results.found[check.name].state for check in checks]
    without_gpu = [
        check for check in checks if CUDA in check.needs and results.found[check.name].state == "skipped"
    ]
    if without_gpu and not any(state in FINISHED for state in states):
        print("nothing was checked; --dry-run tries the command on a machine without a GPU", file=sys.stderr)
        return 1
    return 0 if undisturbed and "failed" not in states else 1


if __name__ == "__main__":
    sys.exit(main())
