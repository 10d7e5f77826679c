"""The rows of ``metrics.jsonl`` as the report reads them."""

from __future__ import annotations

import statistics
from array import array
from collections import defaultdict
from collections.abc import Iterable

from vpo_engine.metrics.time_account import sum_rows
from vpo_engine.runs.charts import Point
from vpo_engine.runs.log_rows import Row

MOST_POINTS = 1000
"""A longer series is thinned, so that the page stays small and quick however long the run was."""
_MOST_MARKS = 40
_MEDIANS = ("seconds/step", "speed/")
"""Beginnings of the names whose median is shown; of these all values are kept."""


class _Series:
    """Points in order of x, of which many become one: the mean of ``share`` neighbours, a power of two."""

    def __init__(self) -> None:
        self.share = 1
        self.count = 0
        self._starts: list[float] = []
        self._means: list[float] = []
        self._sum, self._summed = 0.0, 0
        self._ends: tuple[Point, Point] = ((0.0, 0.0), (0.0, 0.0))

    def add(self, x: float, y: float) -> None:
        self._ends = (self._ends[0] if self.count else (x, y), (x, y))
        self.count += 1
        if not self._summed:
            self._starts.append(x)
        self._sum, self._summed = self._sum + y, self._summed + 1
        if self._summed < self.share:
            return
        self._means.append(self._sum / self.share)
        self._sum, self._summed = 0.0, 0
        if len(self._means) > MOST_POINTS:
            self._halve()

    def points(self) -> list[Point]:
        """Return all points, or, of a thinned series, the first one, means at the middle of their steps, the last."""
        if self.share == 1:
            return list(zip(self._starts, self._means, strict=True))
        ends = [*self._starts[1:], self._ends[1][0]]
        middles = [float((start + end) // 2) for start, end in zip(self._starts, ends, strict=True)]
        return [self._ends[0], *zip(middles, self._means, strict=False), self._ends[1]]

    def _halve(self) -> None:
        """Make one of every two means; an odd one at the end is begun again."""
        pairs = zip(self._means[::2], self._means[1::2], strict=False)
        if len(self._means) % 2:
            self._sum, self._summed = self._means[-1] * self.share, self.share
        self._starts, self._means = self._starts[::2], [(one + other) / 2 for one, other in pairs]
        self.share *= 2


class MetricRows:
    """The log of a run as series of points, which take the same memory however long the run was."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._series: dict[str, dict[str, _Series]] = {"train": {}, "eval": {}}
        self._first: dict[str, Row] = {}
        self._values: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self._refreshes: list[float] = []
        self.steps = 0
        self.timings = sum_rows(map(self._take, rows))
        """The seconds of each stage, as in ``summary.json``."""

    def _take(self, row: Row) -> Row:
        kind, step = str(row["kind"]), float(row["step"])
        series = self._series.setdefault(kind, {})
        self._first.setdefault(kind, row)
        for name, value in row.items():
            if name not in ("step", "kind"):
                series.setdefault(name, _Series()).add(step, float(value))
                if kind == "train" and name.startswith(_MEDIANS):
                    self._values[name].append(float(value))
        if kind == "train":
            self.steps = int(step)
            refreshed = row.get("reference_age") == 0 and row.get("optimizer_steps") != 0
            if refreshed and len(self._refreshes) <= _MOST_MARKS:
                self._refreshes.append(step)
        return row

    def __bool__(self) -> bool:
        return bool(self._first)

    @property
    def share(self) -> int:
        """Return how many steps are one point of the curves of train rows."""
        return max((series.share for series in self._series["train"].values()), default=1)

    def points(self, kind: str, name: str) -> list[Point]:
        """Return a metric's points, at most about ``MOST_POINTS``; [] for a metric that no row has."""
        series = self._series[kind].get(name)
        return [] if series is None else series.points()

    def count(self, name: str) -> int:
        """Return how many train rows have a metric."""
        series = self._series["train"].get(name)
        return 0 if series is None else series.count

    def median(self, name: str) -> float | None:
        """Return the median of a train metric over all steps, of those that begin with ``_MEDIANS``."""
        assert name.startswith(_MEDIANS), name
        return statistics.median(self._values[name]) if name in self._values else None

    def names(self, kind: str, prefix: str) -> list[str]:
        """Return the metrics' names that start with ``prefix``, without it, in order of appearance."""
        return [name.removeprefix(prefix) for name in self._series[kind] if name.startswith(prefix)]

    def first(self, kind: str, prefix: str) -> dict[str, float]:
        """Return the metrics of the first row whose names start with ``prefix``, without the prefix."""
        row = self._first.get(kind, {})
        return {name.removeprefix(prefix): float(row[name]) for name in row if name.startswith(prefix)}

    def refreshes(self) -> list[float]:
        """Return the steps that ended with a refresh of the reference; [] if there are too many to tell apart."""
        return self._refreshes if len(self._refreshes) <= _MOST_MARKS else []
