"""A run that dies in the middle, for tests of what it goes on with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def disk_events(patch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that will hold the names of what is synced or renamed, in order.

    A name on the way to a file's own counts as that one.
    """
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        done.append(name.removeprefix(".").removesuffix(".tmp"))
        fsync(descriptor)

    def renamed(source: Any, target: Any, **options: Any) -> None:
        done.append(Path(source).name)
        rename(source, target, **options)

    patch.setattr(os, "fsync", synced)
    patch.setattr(os, "rename", renamed)
    return done
