"""The metrics of a run, written to ``metrics.jsonl``, to TensorBoard and, if it is asked for, to Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import read_held_out
from vpo_engine.runs.log_rows import Row, parse_row
from vpo_engine.runs.tensorboard_clips import add_animation, side_by_side
from vpo_engine.runs.video import write_mp4
from vpo_engine.runs.wandb_log import WandbLog
from vpo_engine.texts import read_text

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["train", "eval"]

_TOGETHER = {
    "reward": {
        "candidates, held-out videos, judge": [
            "Multiline",
            ["^reward/selected$", "^held_out/reward/selected$", "^held_out/judge/selected$"],
        ]
    }
}
"""Curves that TensorBoard shows in one chart, on its page of custom scalars."""
_SHOWN_LETTERS = 60
"""Letters of a prompt in the name of its clip, of which wandb makes the name of a file."""

_MOST_BYTES = 1 << 32

_logger = logging.getLogger(__name__)


class RunLog:
    """Writes rows of metrics. When ``write`` returns, the row has been handed to the operating system.

    The first process of a run has one; the others have a ``NullLog``.
    """

    def __init__(self, run: RunDirectory, wandb_project: str | None = None) -> None:
        """``wandb_project``: the project at Weights & Biases that gets the rows too; None: none."""
        self._run = run
        self._wandb = None if wandb_project is None else WandbLog(run, wandb_project)
        self._file = run.metrics.open("a", encoding="utf-8", buffering=1)
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = None

    def write(self, step: int, kind: Kind, metrics: Mapping[str, float]) -> None:
        """Append one row. ValueError, naming it, for a number that is not finite; then nothing is written."""
        row = _checked_row(step, kind, metrics)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {name if "/" in name else f"{kind}/{name}": float(row[name]) for name in metrics}
        board = self._tensorboard()
        for name, number in numbers.items():
            board.add_scalar(name, number, step)
        board.flush()
        if self._wandb is not None:
            self._wandb.write(step, kind, numbers)

    def show_held_out(self, step: int) -> None:
        """Write the clips of the held-out gallery, before and after training side by side."""
        gallery = read_held_out(self._run.held_out_gallery)
        pairs = zip(gallery.before, gallery.after, gallery.prompts, strict=True)
        clips = {
            f"held_out_clips/{number:02d} {_plain(prompt)}": side_by_side(before, after)
            for number, (before, after, prompt) in enumerate(pairs)
        }
        self._show(step, "videos", clips, gallery.fps)

    def show_samples(self, step: int, prompts: Sequence[str], videos: Sequence[Tensor], fps: float) -> None:
        """Write videos of an evaluation, uint8 [F, H, W, 3] each, under the step at which they were sampled.

        They have the same names at every evaluation, so that each can be followed over the steps.
        """
        clips = {
            f"samples/{number:02d} {_plain(prompts[number % len(prompts)])}": video
            for number, video in enumerate(videos)
        }
        self._show(step, "samples", clips, fps)

    def _show(self, step: int, what: str, clips: Mapping[str, Tensor], fps: float) -> None:
        board = self._tensorboard()
        for name, clip in clips.items():
            add_animation(board, name, clip, fps, step)
        board.flush()
        if self._wandb is not None:
            with TemporaryDirectory() as folder:
                files = {name: Path(folder) / f"{number:02d}.mp4" for number, name in enumerate(clips)}
                for name, file in files.items():
                    write_mp4(file, clips[name], fps)
                self._wandb.write_videos(step, files, what)

    def resume(self, step: int, last: int) -> bool:
        """Delete the rows that a run of ``last`` steps, resumed after ``step``, will write again.

        They are those of later steps and the evaluation at the end; of a run that had no checkpoint (step 0), all.
        The file is replaced atomically. TensorBoard is told to hide its events from ``step + 1`` on. Return whether the
        log has an evaluation of ``step``.
        """
        rows = [row for row in read_metrics(self._run.metrics) if int(row["step"]) <= step and step > 0]
        if step == last:
            rows = [row for row in rows if (row["step"], row["kind"]) != (last, "eval")]
        self._file.close()
        replacement = self._run.metrics.with_name(f".{self._run.metrics.name}.tmp")
        replacement.unlink(missing_ok=True)  # nothing is written through a link
        with replacement.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(self._run.metrics)
        self._file = self._run.metrics.open("a", encoding="utf-8", buffering=1)
        self._purge_step = step + 1 if step else 0
        return (step, "eval") in {(row["step"], row["kind"]) for row in rows}

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensorboard(self) -> SummaryWriter:
        """Return the TensorBoard writer. It is made at the first row: importing it takes seconds, and ``resume`` must
        come before."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run.tensorboard), purge_step=self._purge_step)
            self._board.add_custom_scalars(_TOGETHER)
        return self._board


class NullLog:
    """The log of all processes but the first: it checks the numbers and writes nothing."""

    def write(self, step: int, kind: Kind, metrics: Mapping[str, float]) -> None:
        _checked_row(step, kind, metrics)

    def resume(self, step: int, last: int) -> bool:
        """Return that nothing is missing; the first process decides."""
        return True

    def show_held_out(self, step: int) -> None: ...

    def show_samples(
        self, step: int, prompts: Sequence[str], videos: Sequence[Tensor], fps: float
    ) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: Path) -> list[Row]:
    """Read all rows of a ``metrics.jsonl``, in file order; [] if there is no file.

    If the last line has no newline, its writing was interrupted; it is left out, with a warning. ValueError, naming
    file and line, for any other line that cannot be read.
    """
    if not path.exists():
        return []
    text = read_text(path, "log of metrics", _MOST_BYTES)
    lines = text.split("\n")
    if lines.pop():
        _logger.warning("'%s': the last line was not finished when the run stopped; it is left out", path)
    return [parse_row(line, f"'{path}' line {number}") for number, line in enumerate(lines, start=1)]


def _plain(prompt: str) -> str:
    """Return the beginning of a prompt without characters that a file's name cannot have."""
    return " ".join(re.sub(r"[^\w ,.-]+", " ", prompt).split())[:_SHOWN_LETTERS]


def _checked_row(step: int, kind: Kind, metrics: Mapping[str, float]) -> Row:
    row: Row = {"step": step, "kind": kind}
    for name, value in metrics.items():
        assert name not in row, f"a metric cannot be called '{name}'"
        number = value if isinstance(value, int) else float(value)
        if not math.isfinite(number):
            raise ValueError(
                f"metric '{name}' of the {kind} row at step {step} is {number}, but only finite numbers are "
                "logged. Find the cause, or leave out a metric that has no value at this step"
            )
        row[name] = number
    return row
