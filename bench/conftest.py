"""Collect the rows of a benchmark run by the fixture ``add_row``, print them at the end, write them with --record.

With ``--rows FOLDER`` each row is written there as soon as it is measured, so that a run that is ended leaves its rows.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from report import by_environment, provenance, table
from rows import Row, environment, record

sys.path.append(
    str(Path(__file__).parents[1] / "tests" / "kernels")
)  # eager_dpo.py, used by tests and benchmarks

ROWS = pytest.StashKey[list[Row]]()
AddRow = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", action="store_true", help="write the measured rows to bench/results/TOPIC.jsonl"
    )
    parser.addoption(
        "--rows", type=Path, metavar="FOLDER", help="write each row to FOLDER/TOPIC.jsonl as it is measured"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # our own tables are printed instead of pytest-benchmark's


@pytest.fixture(scope="session")
def environment_of(pytestconfig: pytest.Config) -> Callable[[torch.device], object]:
    command = shlex.join(["pytest", *pytestconfig.invocation_params.args])
    return functools.cache(lambda device: environment(device, command))


@pytest.fixture
def add_row(pytestconfig: pytest.Config, environment_of) -> AddRow:
    """Return ``add_row(topic, case, numbers, device)``, which records a measured case; see ``rows.Row``."""

    def add(topic: str, case: dict[str, str], numbers: dict[str, float], device: torch.device) -> None:
        row = Row(topic, case, numbers, environment_of(device))
        pytestconfig.stash[ROWS].append(row)
        if folder := pytestconfig.getoption("--rows"):
            record([row], folder)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    for topic in dict.fromkeys(row.topic for row in rows):
        measured = [row for row in rows if row.topic == topic]
        terminalreporter.section(f"bench: {topic}")
        for origin, together in by_environment(measured).items():
            terminalreporter.write_line(provenance(origin) + "\n")
            terminalreporter.write_line(table(topic, together).text() + "\n")
    if rows and config.getoption("--record"):
        for path in record(rows):
            terminalreporter.write_line(f"recorded in {path}")
