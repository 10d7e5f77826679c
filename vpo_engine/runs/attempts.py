"""``attempts.jsonl``: where each start of a run began, and the errors that ended it.

A run that is started again and again, as torchrun does, tells from it that it gets no further.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from vpo_engine.line_files import LineFile
from vpo_engine.runs.checkpoint import newest_complete, step_of
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.texts import parse_json, read_text

_NAME = "attempts.jsonl"
_RESTART = "TORCHELASTIC_RESTART_COUNT"
End = Literal["finished", "stopped", "alarm"]


def begin_attempt(run: RunDirectory, step: int) -> str | None:
    """Note that the run begins after ``step`` steps.

    Return a line if the attempt before began there too, and made no progress that was saved; else None.
    """
    attempts: list[list[dict[str, Any]]] = []
    for line in _read(run.root / _NAME):
        if "from" in line:
            attempts.append([])
        if attempts:
            attempts[-1].append(line)
    newest, (requeued, restart) = _newest(run.checkpoints), _restarts()
    begun = {"from": step, "restart": restart, "requeued": requeued, "newest": newest, "job": _job()}
    _append(run.root / _NAME, begun)
    same: list[Mapping[str, Any]] = []
    for start, *ends in reversed(attempts):
        saved = newest is not None and newest[0] > step and start.get("newest", newest) != newest
        if start["from"] != step or saved or any("ended" in line for line in ends):
            break
        same.append(ends[0] if ends else {})
    return _note(same, step) if same else None


def has_saved(root: Path) -> bool:
    """Return whether the job that starts this process again has saved a checkpoint of the run.

    torchrun starts processes again after an error, and Slurm a job that it has preempted.
    """
    now, first = _restarts(), None
    for line in reversed([line for line in _read(root / _NAME) if "from" in line]):
        then = (line.get("requeued", 0), line["restart"])
        if not _is_ours(line) or then >= now:  # an earlier job may have had the same name
            break
        first, now = line, then
    newest = _newest(RunDirectory.open(root).checkpoints)
    return (
        first is not None and newest is not None and newest[0] > first["from"] and newest != first["newest"]
    )


def fail_attempt(run: RunDirectory, step: int, rank: int, error: str) -> None:
    """Note that the run ended in ``step`` by an error of process ``rank``."""
    _append(run.root / _NAME, {"step": step, "rank": rank, "host": socket.gethostname(), "error": error})


def end_attempt(run: RunDirectory, how: End) -> None:
    """Note that the run ended as it was meant to: at its last step, because it was to stop, or by an alarm."""
    _append(run.root / _NAME, {"ended": how})


def stopped_by_alarm(root: Path) -> bool:
    """Return whether torchrun starts a run again that an alarm has stopped, which torchrun takes for an error."""
    lines = _read(root / _NAME)
    begun: Mapping[str, Any] = next((line for line in reversed(lines) if "from" in line), {})
    return _restarts()[1] > 0 and bool(lines) and lines[-1].get("ended") == "alarm" and _is_ours(begun)


def was_cut_short(run: RunDirectory) -> bool:
    """Return whether the last attempt did not come to the end of the run; False if nothing is known of it."""
    lines = _read(run.root / _NAME)
    return bool(lines) and lines[-1].get("ended") != "finished"


def _note(ends: list[Mapping[str, Any]], step: int) -> str:
    """Return what is known of the attempts that began at ``step``, the newest first."""
    newest, count = ends[0], len(ends)
    began = "the attempt before began" if count == 1 else f"the {count} attempts before began"
    if not newest:
        return (
            f"{began} after step {step} as well, and saved nothing; the last ended without a word, as a process does "
            "that the system kills (out of memory?). Checkpoints that are closer together (checkpoint.every) lose less"
        )
    alike = (
        count > 1 and len({(end.get("step"), _without_numbers(end.get("error", ""))) for end in ends}) == 1
    )
    again = "all of them" if alike else "the last"
    advice = ". Starting again does not help: mend the cause" if alike else ""
    return (
        f"{began} after step {step} as well, and saved nothing; {again} ended in step {newest['step']} by an error of "
        f"rank {newest['rank']}: {newest['error']}{advice}"
    )


def _job() -> str:
    """Return what tells this job of torchrun from others: its name, or else the process that started this one; and
    Slurm's number."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    own = name if name != "none" else f"{socket.gethostname()}:{os.getppid()}"
    return f"{own} {os.environ.get('SLURM_JOB_ID', '')}".strip()


def _is_ours(line: Mapping[str, Any]) -> bool:
    """Return whether this job began an attempt, perhaps before Slurm requeued it, which changes its processes."""
    job, slurm = str(line.get("job", "")), os.environ.get("SLURM_JOB_ID")
    if slurm and line.get("requeued", 0) < _restarts()[0]:
        return job.endswith(f" {slurm}")
    return job == _job()


def _restarts() -> tuple[int, int]:
    """Return how often Slurm has put the job into its queue again, and torchrun has started its processes again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ.get(_RESTART, "0"))


def _newest(checkpoints: Path) -> list[int] | None:
    """Return the step of the newest checkpoint and the time by which it differs from others of that step."""
    newest = newest_complete(checkpoints)
    return None if newest is None else [step_of(newest), (newest / "manifest.json").stat().st_mtime_ns]


def _without_numbers(error: str) -> str:
    return re.sub(r"\d+", "#", error)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    cut = path.exists() and not path.read_bytes().endswith(b"\n")  # a process died while it wrote
    with closing(LineFile(path)) as file:
        file.append((("\n" if cut else "") + json.dumps({"time": now, **line}) + "\n").encode())


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines; one that was not finished when a process died is left out."""
    if not path.exists():
        return []
    found = []
    for line in read_text(path).splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if _is_attempt(value):
            found.append(value)
    return found


def _is_attempt(value: Any) -> bool:
    """Return whether a line has what the engine writes: where an attempt began, how it ended, or its error."""
    if not isinstance(value, dict) or not {"from", "ended", "error"} & value.keys():
        return False
    return "error" not in value or (isinstance(value["error"], str) and {"step", "rank"} <= value.keys())
