"""Run the cells of a grid: several at once, each once, so that an interrupted grid goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from vpo_engine.reproducing.cells import LOG, RESULT, RUN, Cell, Record
from vpo_engine.runs.lock import RunLock, refuse_held
from vpo_engine.texts import say

Old = Literal["refuse", "keep", "redo"]
"""What is done with finished cells that other code or other settings made."""
Commands = Mapping[str, Sequence[str]]
"""The commands of a cell by name, one after the other; each is the arguments of ``python``."""
CELLS, FAILED, REPLACED = "cells", "failed", "replaced"
"""Folders of an output folder: cells, cells that failed, and finished ones that were made again."""
_POLL_SECONDS = 0.05
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""What a cell's processes find: a thread each, and logs whose lines are in the order in which they were printed."""


def commands_of(cell: Cell, folder: Path) -> Commands:
    """Return the commands that make a cell in ``folder``."""
    module = "vpo_engine.reproducing"
    if cell.kind == "run":
        own = [f"run_dir={folder / RUN}", "model.device=cpu", f"seed={cell.seed}"]
        train = ["-m", "vpo_engine.train", cell.source, *cell.settings, *own]
        return {"train": train, "measure": ["-m", f"{module}.measuring", str(folder)]}
    name = {"base": "measuring", "ranking": "ranking", "memory": "planned"}[cell.kind]
    return {name: ["-m", f"{module}.{name}", str(folder)]}


@dataclass
class Found:
    """The cells of a grid as they are now: finished ones, and why others are not."""

    finished: dict[Cell, Path] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)
    missing: list[Cell] = field(default_factory=list)
    old: dict[Cell, str] = field(default_factory=dict)
    """Finished cells that are used although other code made them, with the difference."""


def look_up(cells: Sequence[Cell], out: Path, old: Old = "refuse") -> Found:
    """Find which cells are finished in ``out``.

    A finished cell counts if its recorded configuration and code version are today's. ValueError for others, naming
    the first, unless ``old`` says what to do with them; with "redo" they count as missing.
    """
    found = Found()
    for cell in dict.fromkeys(cells):
        folder = out / CELLS / cell.name
        record = Record.read(folder)
        if record is None or not record.finished:
            found.missing.append(cell)
            continue
        difference = record.differs(cell)
        if difference is not None and old == "redo":
            found.missing.append(cell)
            continue
        found.finished[cell] = folder
        if difference is not None:
            found.old[cell] = difference
    if found.old and old == "refuse":
        name, difference = next((cell.name, text) for cell, text in found.old.items())
        raise ValueError(
            f"{len(found.old)} of {len(found.finished)} finished cells in {out} are not what would be made today; "
            f"{name}: {difference}. Use them all the same and mark the tables with --old keep, make them again with "
            "--old redo, or give another --out"
        )
    return found


class Runner:
    """Makes missing cells in ``out``, ``jobs`` at a time, each in a process of one thread.

    A cell that fails is put apart with its files, and the others go on. On Ctrl-C or SIGTERM the running cells are
    asked to stop, which lets training save its last step, and KeyboardInterrupt is raised when they have.
    """

    def __init__(
        self,
        out: Path,
        jobs: int,
        *,
        commands: Callable[[Cell, Path], Commands] = commands_of,
        say: Callable[[str], None] = say,
    ) -> None:
        """``commands``: what makes a cell; tests give others."""
        self._out, self._jobs, self._commands, self._say = out, jobs, commands, say
        self._working: list[_Work] = []
        self._done = self._total = 0

    def run(self, cells: Sequence[Cell], old: Old = "refuse") -> Found:
        """Make the cells that are missing, and return what is there then."""
        self._out.mkdir(parents=True, exist_ok=True)
        with RunLock(self._out):
            found = look_up(cells, self._out, old)
            for cell in found.missing:
                refuse_held_run(self._out / CELLS / cell.name)
            waiting, self._done, self._total = list(found.missing), 0, len(found.missing)
            with _stoppable():
                try:
                    while waiting or self._working:
                        while waiting and len(self._working) < self._jobs:
                            self._begin(waiting.pop(0))
                        self._poll(found)
                except KeyboardInterrupt:
                    self._stop()
                    raise
        return found

    def _begin(self, cell: Cell) -> None:
        folder = self._out / CELLS / cell.name
        record = Record.read(folder)
        if record is not None and record.differs(cell) is not None:
            _put_apart(folder, self._out / REPLACED)
            record = None
        if record is None:
            record = Record.of(cell)
        record.attempts += 1
        record.write(folder)
        self._say(f"begun: {cell.name}")
        self._working.append(_Work(cell, folder, record, self._commands(cell, folder)))

    def _poll(self, found: Found) -> None:
        """Look once after every running cell, and wait a moment if none has ended."""
        ended = [work for work in self._working if work.ended()]
        for work in ended:
            self._working.remove(work)
            self._done += 1
            found.missing.remove(work.cell)
            place = f"[{self._done}/{self._total}]"
            if work.failure is None:
                found.finished[work.cell] = work.folder
                seconds = sum(processor for processor, _ in work.record.seconds.values())
                self._say(f"{place} {work.cell.name}: {seconds:.0f} s of processor time")
                continue
            text = work.failure
            if work.apart:
                text += f"; its files are in {_put_apart(work.folder, self._out / FAILED)}"
            found.failed[work.cell] = text
            self._say(f"{place} FAILED {work.cell.name}: {text}")
        if not ended:
            time.sleep(_POLL_SECONDS)

    def _stop(self) -> None:
        """Ask all running cells to stop, and wait for them. A second Ctrl-C ends them at once."""
        self._say(f"stopping {len(self._working)} cells; Ctrl-C again ends them at once, without saving")
        try:
            for work in self._working:
                work.send(signal.SIGTERM)
            for work in self._working:
                work.wait()
        except KeyboardInterrupt:
            for work in self._working:
                work.send(signal.SIGKILL)
                work.wait()


class _Work:
    """A cell that is being made: its commands one after the other, as child processes with a log."""

    def __init__(self, cell: Cell, folder: Path, record: Record, commands: Commands) -> None:
        self.cell, self.folder, self.record = cell, folder, record
        self.failure: str | None = None
        self.apart = False
        self._waiting = list(commands.items())
        self._next()

    def ended(self) -> bool:
        """Return whether the last command has ended, or one has failed; go on to the next command otherwise."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self._process.returncode = code = os.waitstatus_to_exitcode(status)
        self._account(usage.ru_utime + usage.ru_stime)
        if code != 0:
            self._fail(code)
            return True
        if self._waiting:
            self._next()
            return False
        if not (self.folder / RESULT).is_file():
            self.failure = f"{self._name} ended well and left no {RESULT}"
            return True
        self.record.finished = True
        self.record.write(self.folder)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the running command and to what it started."""
        if self._process.returncode is not None:
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def wait(self) -> None:
        """Wait until the running command has ended, and record what it took."""
        if self._process.returncode is not None:  # Ctrl-C came just then
            return
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._account(usage.ru_utime + usage.ru_stime)

    def _next(self) -> None:
        self._name, arguments = self._waiting.pop(0)
        self._since = time.monotonic()
        with (self.folder / LOG).open("ab") as log:
            log.write(f"$ python {' '.join(arguments)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )

    def _account(self, processor: float) -> None:
        self.record.add(self._name, processor, time.monotonic() - self._since)
        self.record.write(self.folder)

    def _fail(self, code: int) -> None:
        # A cell that was killed, or is trained and could not be measured, goes on where it was.
        self.apart = code > 0 and len(self.record.seconds) == 1
        text = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").rstrip()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        goes_on = "" if self.apart else "; the same command goes on with it"
        self.failure = f"{self._name} {how} ({text.splitlines()[-1]}){goes_on}"


def refuse_held_run(folder: Path) -> None:
    """Raise ValueError if a process that an earlier runner left behind still works on this cell."""
    if (folder / RUN).is_dir():
        refuse_held(folder / RUN)


def _put_apart(folder: Path, parent: Path) -> Path:
    """Move a cell's folder below ``parent``, under its name with the first free number, and return where it is."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while (place := parent / f"{folder.name}-{number}").exists():
        number += 1
    folder.rename(place)
    return place


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
