"""Write the comparison of strategies as a table, and as JSON."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from vpo_engine.planning.gpus import GIB
from vpo_engine.planning.links import EFFICIENCY, Cluster
from vpo_engine.planning.report import duration
from vpo_engine.planning.strategies import Refused, Row, recommended

WIDTH = 118
HEADER = ("strategy", "peak GiB", "fits", "sends GiB", "computes", "exchanges", "step")


def comparison(
    cluster: Cluster, rows: Sequence[Row], refused: Sequence[Refused], given: Sequence[str] = ()
) -> str:
    """Return the table of strategies, what was left out and why, and what is recommended. given: see ``started``."""
    lines = [str(cluster), *table([HEADER, *map(cells, rows)])]
    for reason in dict.fromkeys(one.reason for one in refused):
        names = "; ".join(one.strategy.name for one in refused if one.reason == reason)
        lines += textwrap.wrap(f"left out: {names}: {reason}", WIDTH, subsequent_indent="  ")
    lines += notes(cluster, rows)
    chosen, why = recommended(rows)
    if chosen is None:
        return "\n".join([*lines, f"no recommendation: {why}"])
    lines += textwrap.wrap(f"recommended: {chosen.strategy.name}: {why}", WIDTH, subsequent_indent="  ")
    lines.append(f"  {started(chosen, cluster, given)}")
    return "\n".join(lines)


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a strategy's line."""
    peak = row.plan.peak
    times = [
        "?" if one is None else duration(one) for one in (row.computing, sum(row.waits.values()), row.seconds)
    ]
    return (
        row.strategy.name,
        f"{peak.total / GIB:.1f} {peak.name}",
        "yes" if row.plan.fits else "NO",
        f"{row.sent / GIB:.2f}",
        *times,
    )


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]


def notes(cluster: Cluster, rows: Sequence[Row]) -> Iterator[str]:
    """Yield where the numbers come from."""
    if rows:
        limit = rows[0].plan
        yield f"a process may take {limit.limit / GIB:.1f} GiB ({limit.limited_by})"
    sources = f"within a machine {cluster.within.rate / 1e9:.0f} GB/s of a GPU ({cluster.within.source})"
    if cluster.nodes > 1:
        sources += (
            f"; between machines {cluster.between.rate / 1e9:.1f} GB/s of each ({cluster.between.source})"
        )
    yield from textwrap.wrap(
        "this is a model, not a measurement: bytes by the formulas of docs/scaling.md, which counts on CPUs confirm; "
        f"links at {EFFICIENCY:.0%} of their rates, nothing hidden behind computing: {sources}; seconds of computing "
        "as python -m vpo_engine.plan estimates them; a step without evaluation and checkpoint",
        WIDTH,
    )


def started(row: Row, cluster: Cluster, given: Sequence[str]) -> str:
    """Return the command that starts a strategy. given: the configuration and settings that the plan was made of."""
    machines = (
        ""
        if cluster.nodes == 1
        else (
            f"--nnodes={cluster.nodes} --rdzv-backend=c10d --rdzv-id=mine --rdzv-endpoint=FIRST_MACHINE:29500 "
        )
    )
    command = f"torchrun {machines}--nproc-per-node={cluster.gpus} -m vpo_engine.train"
    return " ".join(filter(None, [command, shlex.join(given), row.arguments]))


def as_json(cluster: Cluster, rows: Sequence[Row], refused: Sequence[Refused]) -> dict[str, Any]:
    """Return the comparison for machines."""
    chosen, why = recommended(rows)
    return {
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "link_bytes_per_second": cluster.within.rate,
        "network_bytes_per_second": cluster.between.rate,
        "strategies": [
            {
                "name": row.strategy.name,
                "settings": dict(row.strategy.settings),
                "processes": row.processes,
                "peak_bytes": row.plan.peak.total,
                "peak_phase": row.plan.peak.name,
                "limit_bytes": row.plan.limit,
                "fits": row.plan.fits,
                "sent_bytes": {transfer.purpose: transfer.nbytes for transfer in row.sends},
                "computing_seconds": row.computing,
                "waiting_seconds": dict(row.waits),
                "seconds": row.seconds,
            }
            for row in rows
        ],
        "left_out": {one.strategy.name: one.reason for one in refused},
        "recommended": None if chosen is None else chosen.strategy.name,
        "why": why,
    }
