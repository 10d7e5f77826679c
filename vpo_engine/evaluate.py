"""Compare finished runs by their measures on held-out videos.

    python -m vpo_engine.evaluate RUN [RUN ...]

One run: a table of every measure of the base and of the final policy, with the change and its 95 % bounds.
Several runs: a table of the changes. Runs with the same name in their configuration count as seeds of one setting and
share a column; each other name, for example online and offline, has its own column.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpo_engine.config_file import load_config
from vpo_engine.metrics.summary import format_seeds, format_summary, summarise_seeds
from vpo_engine.runs.directory import RunDirectory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    given = parser.parse_args(arguments)
    try:
        print(compare(given.runs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(roots: Sequence[Path]) -> str:
    """Return the table of one run, or of several runs grouped by the name in their configuration."""
    summaries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for root in roots:
        run = RunDirectory.open(root)
        if not run.summary.is_file():
            raise ValueError(
                f"{root} has no {run.summary.name}, so the run has not finished; resume it first"
            )
        name = load_config(run.config).name
        summaries[name].append(json.loads(run.summary.read_text(encoding="utf-8")))
    if len(roots) == 1:
        return format_summary(next(iter(summaries.values()))[0])
    return format_seeds({name: summarise_seeds(group) for name, group in summaries.items()})


if __name__ == "__main__":
    sys.exit(main())
