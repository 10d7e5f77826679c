"""The rows of ``metrics.jsonl`` as the report reads them."""

from __future__ import annotations

from collections.abc import Sequence

from vpo_engine.runs.charts import Point
from vpo_engine.runs.log_rows import Row

_MOST_MARKS = 40


class MetricRows:
    """The rows of ``metrics.jsonl``, read as series of points."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.all = rows
        self._rows = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}
        self.steps = int(self._rows["train"][-1]["step"]) if self._rows["train"] else 0

    def __bool__(self) -> bool:
        return any(self._rows.values())

    def points(self, kind: str, name: str) -> list[Point]:
        return [(float(row["step"]), float(row[name])) for row in self._rows[kind] if name in row]

    def names(self, kind: str, prefix: str) -> list[str]:
        """Return the metrics' names that start with ``prefix``, without it, in order of appearance."""
        found = dict.fromkeys(name for row in self._rows[kind] for name in row if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in found]

    def first(self, kind: str, prefix: str) -> dict[str, float]:
        """Return the metrics of the first row whose names start with ``prefix``, without the prefix."""
        row = next(iter(self._rows[kind]), {})
        return {name.removeprefix(prefix): float(row[name]) for name in row if name.startswith(prefix)}

    def refreshes(self) -> list[float]:
        """Return the steps that ended with a refresh of the reference; [] if there are too many to tell apart."""
        steps = [
            float(row["step"])
            for row in self._rows["train"]
            if row.get("reference_age") == 0 and row.get("optimizer_steps") != 0
        ]
        return steps if len(steps) <= _MOST_MARKS else []
