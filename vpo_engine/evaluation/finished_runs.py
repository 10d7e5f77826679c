"""Compare finished runs by the measures that they have written down themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.metrics.summary import format_seeds, format_summary, summarise_seeds
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.start import differences, show_value
from vpo_engine.runs.summary_file import read_summary

_WITHOUT_EFFECT = (
    "seed",
    "run_dir",
    "log",
    "checkpoint",
    "processes",
    "distributed",
    "disk",
    "memory.limit_gib",
    "memory.overcommit",
    "rollout.batch_size",
    "prompts.cache",
    "model.device",
)
"""Settings, and sections of them, in which seeds of one setting may differ: results do not depend on them, but for
rounding and the seed."""


def compare(roots: Sequence[Path]) -> str:
    """Return the table of one run, or of several runs grouped by the name in their configuration.

    ValueError for a run that has not finished, and for runs of one name that are not seeds of one setting.
    """
    groups: dict[str, list[_Run]] = defaultdict(list)
    for root in roots:
        run = RunDirectory.open(root)
        if not run.summary.is_file():
            raise ValueError(
                f"{root} has no {run.summary.name}, so the run has not finished; let it go on to its end first"
            )
        found = _Run(root, load_config(run.config), read_summary(run.summary))
        groups[found.config.name].append(found)
    if len(roots) == 1:
        return format_summary(next(iter(groups.values()))[0].summary)
    for runs in groups.values():
        _check_seeds(runs)
    return format_seeds(
        {name: summarise_seeds([run.summary for run in runs]) for name, runs in groups.items()}
    )


class _Run(NamedTuple):
    root: Path
    config: Config
    summary: dict[str, Any]


def _check_seeds(runs: Sequence[_Run]) -> None:
    """Raise ValueError unless the runs differ in their seed, and in nothing else that changes results."""
    first = runs[0]
    for number, run in enumerate(runs[1:], start=1):
        different = [
            f"{key}: {show_value(before)} -> {show_value(now)}"
            for key, before, now in differences(first.config, run.config)
            if key not in _WITHOUT_EFFECT and key.partition(".")[0] not in _WITHOUT_EFFECT
        ]
        if different:
            raise ValueError(
                f"{first.root} and {run.root} are both called {run.config.name!r}, which makes them seeds of one "
                f"setting, but their settings differ ({'; '.join(different)}); compare runs of the same settings, or "
                "give one of them another name in its config.yaml"
            )
        for other in runs[:number]:
            if other.config.seed == run.config.seed:
                raise ValueError(
                    f"{other.root} and {run.root} are both {run.config.name!r} with seed={run.config.seed}, so they "
                    "are one result and not two; leave one of them out"
                )
