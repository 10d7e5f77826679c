"""Give a step up, in all processes alike, when one of them is asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from vpo_engine.distributed.processes import Processes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class StepAbandonedError(Exception):
    """The run is asked to stop, and what it was doing was given up in every process. Weights are unchanged."""


class _LeaveError(Exception):
    """This process is asked to stop, and leaves the block that it is in."""


class StopPoints:
    """The places at which long work may be given up.

    ``requested`` tells whether this process is asked to stop. Inside of a ``stoppable`` block, ``check`` leaves the
    block if it is; at the end of the block all processes learn of it, and all raise StepAbandonedError.
    """

    def __init__(self, processes: Processes) -> None:
        self.requested: Callable[[], bool] = lambda: False
        self._processes = processes
        self._open = self._inside = False

    def check(self) -> None:
        """Leave the current block if this process is asked to stop. The watchdog learns that something was reached."""
        self._processes.stages.reached()
        if self._inside and self.requested():
            raise _LeaveError

    def before(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return ``function``, which is then not begun if this process is asked to stop."""

        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            self.check()
            return function(*args, **kwargs)

        return checked

    @contextmanager
    def stoppable(self, together: bool = False) -> Iterator[None]:
        """Mark work that changes no weights. Every process must enter the same blocks in the same order.

        together: processes wait for each other inside of the block, so that none may leave it alone; then it is given
        up at its end, or where the work of a ``share`` ends. Processes that hold slices of the same videos always wait
        for each other, and have no shares.
        """
        left = False
        sliced = self._processes.sequence.count > 1
        self._open, self._inside = not sliced, not (together or sliced)
        try:
            yield
        except _LeaveError:
            left = True
        finally:
            self._open = self._inside = False
        if self._processes.any(left or self.requested()):
            raise StepAbandonedError

    @contextmanager
    def share(self, team: Processes) -> Iterator[None]:
        """Mark this process's share of work that a team does together, inside of a ``stoppable`` block.

        In a share nobody waits for anybody, so that a process may leave it. At its end the team learns of it, and all
        leave the block. Processes that share guided predictions do wait for each other, and go on to the end.
        """
        if team.count == 1 or team.couple is not None or not self._open:
            yield
            return
        left, self._inside = False, True
        try:
            yield
        except _LeaveError:
            left = True
        finally:
            self._inside = False
        if team.any(left):
            raise _LeaveError
