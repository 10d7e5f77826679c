"""The log of a run at Weights & Biases, beside ``metrics.jsonl`` and TensorBoard.

wandb is imported only where it is asked for.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from vpo_engine.full_disk import writing
from vpo_engine.runs.directory import RunDirectory

_SWITCHED_OFF = ("offline", "dryrun", "disabled")
"""Values of WANDB_MODE with which nothing is sent."""
_REMEDY = (
    "set WANDB_MODE=offline to keep the log in the run directory and send it later with wandb sync, or leave out "
    "log.wandb"
)


def check_wandb(project: str) -> None:
    """Raise ValueError if wandb is missing or does not load, or if it is to send something and cannot log in."""
    wandb = _import(project)
    if os.environ.get("WANDB_MODE", "online") in _SWITCHED_OFF:
        return
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ValueError(
            f"log.wandb={project}: wandb cannot log in ({_first_line(error)}); run wandb login, {_REMEDY}"
        ) from error


class WandbLog:
    """Sends rows of metrics and videos to one run at Weights & Biases.

    ``wandb.txt`` in the run directory holds the run's id, and a line for every row that was sent. So a run that is
    resumed goes on at the same place there, and a step that is made again is not sent twice.
    """

    def __init__(self, run: RunDirectory, project: str) -> None:
        wandb = _import(project)
        self._wandb = wandb
        earlier = next(_lines(run.wandb), None)
        run_id = earlier or secrets.token_hex(4)
        self._path, self._first = run.wandb, 0
        self._sent: set[str] | None = None
        entity, _, name = project.rpartition("/")
        try:
            self._run = wandb.init(
                entity=entity or None,
                project=name,
                id=run_id,
                resume="allow",
                name=run.name,
                dir=str(run.root),
                config=yaml.safe_load(run.config.read_text(encoding="utf-8")),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"log.wandb={project}: wandb cannot start ({_first_line(error)}); {_REMEDY}"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._file = run.wandb.open("a", encoding="utf-8", buffering=1)
        if not earlier:
            self._file.write(f"{run_id}\n")

    def resume(self, step: int) -> None:
        """Say that the run goes on after ``step``, so that rows of earlier steps will not come again."""
        self._first, self._sent = step, None

    def write(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        """Send one row, unless an earlier start of the run has sent it."""
        self._send(f"{step} {kind}", {"step": step, **numbers})

    def write_videos(self, step: int, videos: Mapping[str, Path], what: str = "videos") -> None:
        """Send video files, {name: file}, unless an earlier start of the run has sent those of this step.

        what: tells the videos of a step from others of the same step.
        """
        self._send(
            f"{step} {what}",
            {"step": step, **{name: self._wandb.Video(str(file)) for name, file in videos.items()}},
        )

    def close(self) -> None:
        """Finish the run there; it counts as failed if an error is on its way."""
        self._file.close()
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)

    def _send(self, row: str, values: dict[str, Any]) -> None:
        if self._sent is None:  # the file has other rows only until the first one is written
            self._sent = _rows_sent(self._path, self._first)
        if row in self._sent:
            return
        self._run.log(values)
        with writing(self._path):
            self._file.write(f"{row}\n")


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def _rows_sent(path: Path, first: int) -> set[str]:
    """Return the rows of step ``first`` and later steps that earlier starts of the run have sent."""
    return {row for row in islice(_lines(path), 1, None) if int(row.partition(" ")[0]) >= first}


def _import(project: str) -> ModuleType:
    """Import wandb. A folder wandb beside the program, which wandb itself makes, is not the package."""
    spec = find_spec("wandb") if "wandb" not in sys.modules else None
    if "wandb" not in sys.modules and (spec is None or spec.origin is None):
        raise ValueError(
            f'log.wandb={project} needs the package wandb: pip install "vpo-engine[wandb]", or leave out log.wandb'
        )
    try:
        import wandb
    except Exception as error:  # a broken installation may raise anything
        raise ValueError(
            f"log.wandb={project} needs the package wandb, which cannot be imported ({type(error).__name__}: "
            f'{_first_line(error)}); pip install --force-reinstall "vpo-engine[wandb]", or leave out log.wandb'
        ) from error
    return wandb


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
