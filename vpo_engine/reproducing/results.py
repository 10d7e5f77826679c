"""Put finished cells together to the numbers of a table: changes with intervals, and verdicts on the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vpo_engine.metrics.measures import describe
from vpo_engine.reproducing.cells import Cell
from vpo_engine.reproducing.reading import Ran, base_cell, base_clips, read_run
from vpo_engine.reproducing.spec import BASE, AlarmClaim, Claim, Column, CurveClaim, Row, Table
from vpo_engine.reproducing.statistics import Clips, Interval, Verdict, interval, minus, verdict

_FALL = 0.1
"""A curve falls if it ends below its highest point by more than this share of its rise."""
_BETTER = {"judge/frechet": -1, "judge/moving_quality": +1}
"""Directions of measures that ``metrics.measures`` does not know."""


def better(measure: str) -> int:
    """Return +1 if more of a measure is better, -1 if less is, 0 if neither."""
    return _BETTER[measure] if measure in _BETTER else describe(measure).better


@dataclass(frozen=True)
class RowResult:
    """The results of the finished runs of a row.

    values: means after training by measure. changes: from the base policy, by measure. seeds: the seeds that are there.
    seconds: processor seconds of training and videos: those that the reward scored, means over seeds; None for the
    base policy.
    """

    row: Row
    values: Mapping[str, float]
    changes: Mapping[str, Interval]
    seeds: tuple[int, ...]
    seconds: float | None = None
    videos: float | None = None
    alarms: Mapping[int, Sequence[str]] | None = None


@dataclass(frozen=True)
class Judged:
    """A claim, what was found here in words, and the verdict."""

    said: str
    here: str
    verdict: Verdict


@dataclass(frozen=True)
class TableResult:
    """All numbers of a table. missing: cells that are not there, in words."""

    table: Table
    rows: Sequence[RowResult]
    judged: Sequence[Judged]
    runs: Mapping[str, Mapping[int, Ran]]
    missing: Sequence[str]
    clips: int

    @property
    def records(self) -> list[Ran]:
        return [ran for by_seed in self.runs.values() for ran in by_seed.values()]


def cells_of(
    table: Table, seeds: Sequence[int], quick: bool, more: Mapping[str, Sequence[str]]
) -> dict[tuple[str, int], Cell]:
    """Return the runs of a table: {(label of the row, seed): cell}. ``more``: settings to add, by row."""
    return {
        (row.label, seed): Cell(
            "run",
            (
                *table.settings,
                *row.settings,
                *_quick(table, row, quick),
                *more.get(row.label, ()),
            ),
            seed,
        )
        for row in table.rows
        if row.label != BASE
        for seed in seeds
    }


def _quick(table: Table, row: Row, quick: bool) -> tuple[str, ...]:
    if not quick:
        return ()
    return table.quick if row.quick is None else row.quick


def gather(table: Table, cells: Mapping[tuple[str, int], Cell], finished: Mapping[Cell, Path]) -> TableResult:
    """Read the finished cells of a table and compute its numbers. ``finished`` has the cells of the base policy too."""
    runs: dict[str, dict[int, Ran]] = {row.label: {} for row in table.rows}
    before: dict[str, dict[int, Mapping[str, list[float]]]] = {row.label: {} for row in table.rows}
    missing = []
    for (label, seed), cell in cells.items():
        base = base_cell(cell)
        if cell in finished and base in finished:
            runs[label][seed] = read_run(finished[cell])
            before[label][seed] = base_clips(finished[base])
        else:
            missing.append(f"{label}, seed {seed}")
    rows = [_row(table, row, runs[row.label], before[row.label]) for row in table.rows if runs[row.label]]
    bases = {seed: clips for by_seed in before.values() for seed, clips in by_seed.items()}
    if bases:
        rows.insert(0, _base_row(table, bases))
    judged = [_judge(claim, runs, bases) for claim in table.claims]
    clips = max((len(next(iter(clips.values()))) for clips in bases.values()), default=0)
    return TableResult(table, rows, judged, runs, missing, clips)


def _measures(table: Table) -> list[str]:
    return [column.measure for column in table.columns]


def _row(
    table: Table, row: Row, runs: Mapping[int, Ran], before: Mapping[int, Mapping[str, list[float]]]
) -> RowResult:
    values, changes = {}, {}
    for name in _measures(table):
        after = {seed: ran.clips[name] for seed, ran in runs.items()}
        values[name] = interval(after).mean
        changes[name] = interval(minus(after, {seed: clips[name] for seed, clips in before.items()}))
    count = len(runs)
    return RowResult(
        row,
        values,
        changes,
        tuple(sorted(runs)),
        math.fsum(ran.training_seconds for ran in runs.values()) / count,
        math.fsum(ran.videos for ran in runs.values()) / count,
        {seed: [alarm["kind"] for alarm in ran.alarms] for seed, ran in runs.items()},
    )


def _base_row(table: Table, bases: Mapping[int, Mapping[str, list[float]]]) -> RowResult:
    values = {
        name: interval({seed: clips[name] for seed, clips in bases.items()}).mean for name in _measures(table)
    }
    paper = next((row.paper for row in table.rows if row.label == BASE), {})
    return RowResult(Row(BASE, paper=paper), values, {}, tuple(sorted(bases)))


def _judge(
    claim: Claim | CurveClaim | AlarmClaim,
    runs: Mapping[str, Mapping[int, Ran]],
    bases: Mapping[int, Mapping[str, list[float]]],
) -> Judged:
    if isinstance(claim, Claim):
        return _judge_order(claim, runs, bases)
    if isinstance(claim, CurveClaim):
        return _judge_curve(claim, runs.get(claim.row, {}))
    return _judge_alarms(claim, runs.get(claim.row, {}))


def _judge_order(
    claim: Claim, runs: Mapping[str, Mapping[int, Ran]], bases: Mapping[int, Mapping[str, list[float]]]
) -> Judged:
    def clips(label: str) -> Clips:
        if label == BASE:
            return {seed: found[claim.measure] for seed, found in bases.items()}
        return {seed: ran.clips[claim.measure] for seed, ran in runs.get(label, {}).items()}

    sign = better(claim.measure) or 1
    pairs = [(more, less) for more in claim.more for less in claim.less]
    found = [minus(clips(more), clips(less)) for more, less in pairs]
    towards = [{seed: [sign * value for value in row] for seed, row in one.items()} for one in found]
    said = [
        f"{more} - {less}: {format_interval(interval(one))}" if one else f"{more} - {less}: not run"
        for (more, less), one in zip(pairs, found, strict=True)
    ]
    return Judged(claim.said, "; ".join(said), verdict(towards))


def _judge_curve(claim: CurveClaim, runs: Mapping[int, Ran]) -> Judged:
    """Judge whether a curve falls from its highest point, seed by seed; seeds must agree."""
    falls, said = [], []
    for seed, ran in sorted(runs.items()):
        points = [(row["step"], row[claim.measure]) for row in ran.curve if claim.measure in row]
        if len(points) < 3:
            continue
        (_, first), (step, last) = points[0], points[-1]
        top_step, top = max(points[1:], key=lambda point: point[1])
        falls.append(top - last > _FALL * max(top - first, 0.0) and top_step < step)
        said.append(
            f"seed {seed}: {first:.2f}, highest {top:.2f} at step {top_step}, {last:.2f} at step {step}"
        )
    if not falls:
        return Judged(claim.said, "not run", "not run")
    found: Verdict = "cannot tell"
    if all(fall == claim.falls for fall in falls):
        found = "agrees"
    elif all(fall != claim.falls for fall in falls):
        found = "disagrees"
    return Judged(claim.said, "; ".join(said), found)


def _judge_alarms(claim: AlarmClaim, runs: Mapping[int, Ran]) -> Judged:
    """Judge the guards on runs that collapsed and on runs that did not.

    A run has collapsed if the judge's mean of its clips fell below the base policy's by its own log.
    """
    right, said = [], []
    for seed, ran in sorted(runs.items()):
        judge = [row["held_out/judge/selected"] for row in ran.curve]
        collapsed = judge[-1] < judge[0]
        alarms = [
            f"{alarm['kind']} at step {alarm['step']}" for alarm in ran.alarms if alarm["kind"] != "prompt"
        ]
        right.append(collapsed == bool(alarms))
        said.append(
            f"seed {seed}: judge {judge[0]:.2f} -> {judge[-1]:.2f}, {'collapsed' if collapsed else 'honest'}, "
            f"{' and '.join(alarms) or 'no alarm'}"
        )
    if not right:
        return Judged(claim.said, "not run", "not run")
    return Judged(claim.said, "; ".join(said), "agrees" if all(right) else "disagrees")


def format_interval(found: Interval, places: int = 3) -> str:
    """Return an interval as "+0.123 ± 0.045", with as many places as its width justifies, at most ``places``."""
    if found.half is None:
        return f"{found.mean:+.{places}f}"
    digits = places if found.half <= 0 else min(places, max(0, 1 - math.floor(math.log10(found.half))))
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}"


def column_title(column: Column) -> str:
    """Return a column's heading with the direction that is better."""
    return column.label + {1: " ↑", -1: " ↓", 0: ""}[better(column.measure)]
