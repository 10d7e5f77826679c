"""The state of an evaluation: findings about videos, in files that every process appends to.

A row is about the bytes of a video, by their SHA-256, so a renamed file keeps its results and a changed one loses them.
Rows of metrics also name the metric's digest (``metric_key``) and the prompt. A row that was cut off is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from vpo_engine.metrics.video_metric import Record
from vpo_engine.texts import parse_json, shortened, why_no_file


@dataclass(frozen=True)
class Facts:
    """The size and rate of a video file, or the reason why it cannot be read (``error``)."""

    sha256: str
    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    error: str = ""

    def describe(self) -> str:
        """Return frames, size and rate for people."""
        return f"{self.frames} frames of {self.height} x {self.width} at {self.fps:g} fps"

    @property
    def shape(self) -> tuple[int, int, int, float]:
        return self.frames, self.height, self.width, self.fps


FACTS, METRIC = "facts", "metric"
"""The kinds of rows."""
_TYPES = {
    **dict.fromkeys(("sha256", "video", "prompt", "error"), (str,)),
    **dict.fromkeys(("frames", "height", "width"), (int,)),
    "fps": (int, float),
}
"""The types of what rows hold, by name."""


Row = TypeVar("Row", Facts, Record)


class Records:
    """The rows of an evaluation. Each process writes a file of its own, and reads all of them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._file = folder, folder / f"process_{rank}.jsonl"
        self._facts: dict[str, Facts] = {}
        self._found: dict[tuple[str, str, str], Record] = {}
        self._failed_facts: dict[str, Facts] = {}
        self._failed: dict[tuple[str, str, str], Record] = {}
        self.unloaded: dict[str, str] = {}
        """Metrics that could not be loaded, and why."""

    def read(self, failures: Collection[str] = ()) -> None:
        """Read what all processes have written. ``failures``: kinds of rows, of which also what failed is kept.

        Files that could not be read, and videos on which a metric failed, are tried again in every start.
        """
        for file in sorted(self._folder.glob("process_*.jsonl")):
            if reason := why_no_file(file):
                raise ValueError(reason)
            whole = file.read_bytes().rpartition(b"\n")[0]
            for number, line in enumerate(whole.split(b"\n"), start=1):
                if line.strip():
                    self._read_row(file, number, line, failures)

    def _read_row(self, file: Path, number: int, line: bytes, failures: Collection[str]) -> None:
        """Keep what a line says. Raise ValueError, naming it, for one that was not written by an evaluation."""
        try:
            row = parse_json(line.decode())
            assert row["kind"] in (FACTS, METRIC)
            self._keep(row, row["kind"] in failures)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"{file}, line {number} is damaged ({shortened(repr(error))}); remove the file, and its videos are "
                "measured again"
            ) from error

    def begin(self) -> None:
        """Make the folder, and remove a row of this process that was cut off."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            content = self._file.read_bytes()
            with self._file.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

    def facts(self, sha256: str) -> Facts | None:
        return self._facts.get(sha256) or self._failed_facts.get(sha256)

    def record(self, sha256: str, metric: str, prompt: str) -> Record | None:
        key = (sha256, metric, prompt)
        return self._found.get(key) or self._failed.get(key)

    def add_facts(self, facts: Facts) -> None:
        self._append({"kind": FACTS, **asdict(facts)})

    def add_record(self, sha256: str, metric: str, record: Record) -> None:
        self._append({"kind": METRIC, "sha256": sha256, "metric": metric, "record": record.to_fields()})

    def _append(self, row: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._keep(row, failures=True)

    def _keep(self, row: dict[str, Any], failures: bool) -> None:
        if row["kind"] == FACTS:
            facts = _checked(Facts(**{key: value for key, value in row.items() if key != "kind"}), FACTS)
            if not facts.error:
                self._facts[facts.sha256] = facts
            elif failures:
                self._failed_facts[facts.sha256] = facts
            return
        record = _checked(Record.from_fields(row["record"]), METRIC)
        assert all(type(value) in (int, float) for value in record.values.values())
        assert isinstance(record.details, dict)
        key = (row["sha256"], row["metric"], record.prompt)
        if not record.error:
            self._found[key] = record
        elif failures:
            self._failed[key] = record


def _checked(row: Row, kind: str) -> Row:
    """Return a row. Raise TypeError if a value has another type than the engine writes."""
    for name, types in _TYPES.items():
        if hasattr(row, name) and type(getattr(row, name)) not in types:
            raise TypeError(f"{name} of {kind} is {getattr(row, name)!r}")
    return row
