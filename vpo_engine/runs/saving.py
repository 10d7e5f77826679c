"""Save the checkpoints of a run: while training waits, or in a thread while training goes on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vpo_engine.config import CheckpointConfig
from vpo_engine.memory.host_copy import HostCopies
from vpo_engine.runs.checkpoint import save_checkpoint


class CheckpointSaver:
    """Saves checkpoints into one folder. In the background there is at most one save at a time, of copies on the host.

    It is a context. Leaving it waits for the save in progress, except on a KeyboardInterrupt, which is to end the run
    at once: an unfinished checkpoint is invisible, and the next save removes it.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        device: torch.device,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``say``: shows a line to the user."""
        self._folder, self._keep, self._say = folder, settings.keep, say
        self._copies = HostCopies(device) if settings.background else None
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None

    def begin(self, step: int) -> HostCopies | None:
        """Prepare for the save of ``step``, and return what copies its state to the host; None in the foreground.

        Wait for a save that is still in progress, and raise the error that it ended in.
        """
        if self._copies is None:
            return None
        if self.writing:
            self._say(
                f"step {step} is to be saved, and waits for the checkpoint of step {self._step}, which is still being "
                "written; a larger checkpoint.every avoids this"
            )
        self.wait()
        self._copies.begin()
        return self._copies

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        **writers: Callable[[Path], None] | None,
    ) -> None:
        """Save a checkpoint as ``save_checkpoint`` does, or begin to; call ``begin`` before.

        The tensors may change when this returns. In the background ``writers`` must write copies.
        """
        if self._copies is None:
            save_checkpoint(self._folder, step, tensors=tensors, state=state, keep=self._keep, **writers)
            return
        kept, said = self._copies.tensors(tensors), copy.deepcopy(dict(state))
        self._copies.wait()

        def write() -> None:
            try:
                save_checkpoint(self._folder, step, tensors=kept, state=said, keep=self._keep, **writers)
            except BaseException as error:
                self._error = error

        self._step = step
        self._thread = threading.Thread(target=write, name="vpo-checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Return whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a save that has ended in one; do not wait."""
        if not self.writing:
            self.wait()

    def settle(self) -> None:
        """Wait until nothing is being written. An error is raised later."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Wait until nothing is being written, and raise the error of a save that has ended in one."""
        self.settle()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt):
            self.settle()
            if self._error is not None:  # beside the error that ends the run
                self._say(f"the checkpoint of step {self._step} was not saved: {self._error}")
