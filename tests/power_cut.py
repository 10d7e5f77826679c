"""A run that dies in the middle, for tests of what it goes on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vpo_engine.online_vpo import OnlineVPO


@contextmanager
def power_cut(after: int) -> Iterator[None]:
    """Let the run that is started inside die at the beginning of the step after ``after`` optimizer steps."""
    whole_step = OnlineVPO.step

    def dies(self: OnlineVPO, prompts: object) -> object:
        if self.optimizer_steps == after:
            raise RuntimeError("power cut")
        return whole_step(self, prompts)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineVPO, "step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            yield


def copy_cut(run: Path, copy: Path, step: int) -> None:
    """Copy a run as if it had died after the checkpoint of ``step``: with rows that it wrote later, and nothing that it
    saved later."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (copy / "summary.json").unlink()
