"""The end of a run: its outcome, or, of an error, the message, the note in its directory and the answer to torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vpo_engine.command import tell_torchrun
from vpo_engine.config import Config
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.watchdog import EXIT_CODE, Watchdog
from vpo_engine.errors import DiskFullError, LostProcessError
from vpo_engine.runs.attempts import End, end_attempt, fail_attempt
from vpo_engine.runs.directory import RunDirectory


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    steps: how many steps were made. summary: of the evaluation at the end; None if the run was stopped before.
    stopped_by: what stopped it; a checkpoint holds the last step then, if there was one. exit_code: of the command.
    alarmed: an alarm stopped it.
    """

    steps: int
    summary: dict[str, object] | None
    stopped_by: str | None = None
    exit_code: int = 0
    alarmed: bool = False

    @property
    def how(self) -> End:
        return "finished" if self.stopped_by is None else "alarm" if self.alarmed else "stopped"


class Ending:
    """Notes errors of this process in the directory of its ``run``, once that is set."""

    def __init__(self, processes: Processes) -> None:
        self.run: RunDirectory | None = None
        self._processes = processes

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error that ends this block; not that another process is gone, which has noted its own."""
        try:
            yield
        except LostProcessError:
            raise
        except Exception as error:
            self._note(
                str(error)
                if isinstance(error, ValueError | DiskFullError)
                else f"{type(error).__name__}: {error}"
            )
            raise
        except KeyboardInterrupt:
            self.ended("stopped")
            raise

    def ended(self, how: End) -> None:
        """Note that the run ended as it was meant to; see ``end_attempt``."""
        if self.run is not None and self._processes.first:
            end_attempt(self.run, how)

    def watchdog(self, config: Config) -> Watchdog:
        """Return the watchdog of this process, which ends it at once."""
        here, minutes = self._processes, config.distributed.stage_minutes
        if minutes == "auto" and here.device.type == "cpu":
            minutes = None
        return Watchdog(here.stages, minutes, self._hangs, rank=here.rank, count=here.count, store=here.store)

    def _hangs(self, reason: str) -> None:
        os.write(sys.stderr.fileno(), f"\nerror: {reason}\n".encode())
        tell_torchrun(f"error: {reason}")
        self._note(reason)
        os._exit(EXIT_CODE)

    def _note(self, error: str) -> None:
        if self.run is None:
            return
        try:
            fail_attempt(self.run, self._processes.stages.now.step, self._processes.rank, error)
        except DiskFullError as full:  # beside the error that ends the run, which is told by itself
            os.write(sys.stderr.fileno(), f"the end of the run was not noted: {full}\n".encode())
