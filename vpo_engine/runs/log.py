"""The metrics of a run, written to ``metrics.jsonl``, to TensorBoard and, if it is asked for, to Weights & Biases."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from vpo_engine import line_files
from vpo_engine.full_disk import writing
from vpo_engine.line_files import Line, LineFile, read_lines
from vpo_engine.runs.checkpoint import delete_after
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import read_held_out
from vpo_engine.runs.log_rows import Row, parse_row
from vpo_engine.runs.tensorboard_clips import add_animation, animation, side_by_side
from vpo_engine.runs.video import write_mp4
from vpo_engine.runs.wandb_log import WandbLog

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


class RunLog:
    """Writes rows of metrics. When ``write`` returns, the row has been handed to the operating system.

    The first process of a run has one; the others have a ``NullLog``. ``metrics.jsonl`` and TensorBoard's event files
    are written in parts of bounded size (see ``line_files``).
    """

    def __init__(self, run: RunDirectory, wandb_project: str | None = None) -> None:
        """``wandb_project``: the project at Weights & Biases that gets the rows too; None: none."""
        self._run = run
        self._wandb = None if wandb_project is None else WandbLog(run, wandb_project)
        self._file = LineFile(run.metrics)
        self._board: SummaryWriter | None = None
        self._board_bytes = 0
        self._purge_step: int | None = None

    def write(self, step: int, kind: Kind, metrics: Mapping[str, float]) -> None:
        """Append one row. ValueError, naming it, for a number that is not finite; then nothing is written."""
        row = _checked_row(step, kind, metrics)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self._file.append(line)
        numbers = {name if "/" in name else f"{kind}/{name}": float(row[name]) for name in metrics}
        with self._on_board(len(line)) as board:
            for name, number in numbers.items():
                board.add_scalar(name, number, step)
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
        images = {name: animation(clip, fps) for name, clip in clips.items()}
        with self._on_board(sum(len(image.content) for image in images.values())) as board:
            for name, image in images.items():
                add_animation(board, name, image, step)
        if self._wandb is not None:
            with TemporaryDirectory() as folder:
                files = {name: Path(folder) / f"{number:02d}.mp4" for number, name in enumerate(clips)}
                for name, file in files.items():
                    write_mp4(file, clips[name], fps)
                self._wandb.write_videos(step, files, what)

    def resume(self, step: int, last: int) -> Row | None:
        """Delete what a run of ``last`` steps, resumed after ``step``, gives up and will write again.

        These are the checkpoints, the clips of pairs and the rows of later steps, and the result of an earlier end; for
        a run that had no checkpoint (step 0), all. Checkpoints go first: no other start may go on from a step whose
        rows are gone.
        Files are replaced atomically. TensorBoard is told to hide its events from ``step + 1`` on. Return the
        evaluation of ``step``, if the log has it.
        """

        def stays(line: Line) -> bool:
            row = _row_of(line)
            return step > 0 and int(row["step"]) <= step and (row["step"], row["kind"]) != (dropped, "eval")

        delete_after(self._run.checkpoints, step)
        for result in (self._run.summary, self._run.held_out_gallery):
            result.unlink(missing_ok=True)
        for clips in self._run.pairs_gallery.glob("step_*.safetensors"):
            if clips > self._run.pairs_file(step):
                clips.unlink()
        dropped = last if step == last else None
        newest = self._file.cut(stays)
        self._purge_step = step + 1 if step else 0
        if self._wandb is not None:
            self._wandb.resume(step)
        row = {} if newest is None else _row_of(newest)
        return row if (row.get("step"), row.get("kind")) == (step, "eval") else None

    def sync(self) -> None:
        """Bring all rows to the disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            board, self._board = self._board, None
            with writing(self._run.tensorboard):
                board.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _on_board(self, size: int) -> Iterator[SummaryWriter]:
        """Give TensorBoard's writer, for about ``size`` bytes of events; they are with the system afterwards."""
        with writing(self._run.tensorboard):
            try:
                board = self._tensorboard()
                yield board
                board.flush()
            except OSError:
                self._board = None  # its thread has ended, and closing it would raise the same error again
                raise
        self._board_bytes += size

    def _tensorboard(self) -> SummaryWriter:
        """Return the TensorBoard writer, a new one when the file of the last one is full.

        It is made at the first row: importing it takes seconds, and ``resume`` must come before.
        """
        if self._board is not None and self._board_bytes >= line_files.PART_BYTES:
            self._board.close()
            self._board, self._board_bytes, self._purge_step = None, 0, None
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run.tensorboard), purge_step=self._purge_step)
            self._board.add_custom_scalars(_TOGETHER)
        return self._board


class NullLog:
    """The log of all processes but the first: it checks the numbers and writes nothing."""

    def write(self, step: int, kind: Kind, metrics: Mapping[str, float]) -> None:
        _checked_row(step, kind, metrics)

    def resume(self, step: int, last: int) -> Row | None:
        """Return None: the first process has the rows."""
        return None

    def sync(self) -> None: ...

    def show_held_out(self, step: int) -> None: ...

    def show_samples(
        self, step: int, prompts: Sequence[str], videos: Sequence[Tensor], fps: float
    ) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: Path) -> list[Row]:
    """Read all rows of a log, as ``iterate_metrics`` does."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[Row]:
    """Yield the rows of a ``metrics.jsonl`` and of its earlier parts, in order; nothing if there is no file.

    If the last line has no newline, its writing was interrupted; it is left out, with a warning. ValueError, naming
    file and line, for any other line that cannot be read.
    """
    return map(_row_of, read_lines(path))


def _row_of(line: Line) -> Row:
    place = f"'{line.file}' line {line.number}"
    try:
        return parse_row(line.content.decode(), place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text ({error}); remove or repair it") from error


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
