"""Rows of measurements: the case, its numbers, and the machine, time and command of the measurement.

``pytest bench/ --record`` writes them to ``bench/results/TOPIC.jsonl``, one row per line. A file has at most one row
per case and machine (hardware and threads): a new measurement replaces the old one, which stays in git's history.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Environment:
    """The machine, versions, time and command with which a row was measured."""

    hardware: str
    threads: int  # of torch on the CPU
    torch: str
    triton: str
    python: str
    commit: str  # git describe; "+dirty" when tracked files differ from it; "unknown" outside a checkout
    date: str  # ISO 8601, UTC
    command: str


@dataclass(frozen=True)
class Row:
    """A measured case. A number's name ends with its unit, ``seconds`` or ``bytes``; other numbers are counts."""

    topic: str
    case: dict[str, str]
    numbers: dict[str, float]
    environment: Environment

    @property
    def key(self) -> tuple[object, ...]:
        """Rows with the same key replace each other."""
        return *sorted(self.case.items()), self.environment.hardware, self.environment.threads


def hardware(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's name with the vector instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for name, _, value in fields if name.strip() == "model name"), model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _git(*arguments: str) -> str | None:
    """Return git's output in the checkout, or None if it fails."""
    try:
        ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def commit() -> str:
    """Return the checkout's commit. Changes of recorded rows and of their page do not make it dirty."""
    top = _git("rev-parse", "--show-toplevel")
    name = _git("describe", "--tags", "--always") if top and Path(top).samefile(ROOT) else None
    if name is None:
        return "unknown"
    changes = (":!bench/results", ":!docs/benchmarks.md")
    return name + ("+dirty" if _git("status", "--porcelain", "-uno", "--", ".", *changes) else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def environment(device: torch.device, command: str) -> Environment:
    return Environment(
        hardware=hardware(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )


def _parse(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
        return Row(**{**fields, "environment": Environment(**fields["environment"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{where} is not a row ({error}); it must be a JSON object of {[f.name for f in dataclasses.fields(Row)]} "
            f"with an environment of {[f.name for f in dataclasses.fields(Environment)]}. "
            "Delete the line and record again: pytest bench/ --record"
        ) from error


def read(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """Read the recorded rows by topic, in the order of measurement. ValueError names a line that is not a row."""
    return {path.stem: _read_topic(path) for path in sorted(folder.glob("*.jsonl"))}


def _read_topic(path: Path) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def record(rows: Iterable[Row], folder: Path = RESULTS) -> list[Path]:
    """Write rows to the files of their topics, replacing rows with the same key; return the paths."""
    by_topic: dict[str, list[Row]] = {}
    for row in rows:
        by_topic.setdefault(row.topic, []).append(row)
    return [_write_topic(folder / f"{topic}.jsonl", new) for topic, new in by_topic.items()]


def _write_topic(path: Path, new: list[Row]) -> Path:
    merged = {row.key: row for row in _read_topic(path)}
    merged.update({row.key: row for row in new})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in merged.values()))
    os.replace(temporary, path)
    return path


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """Return the median and the 20 % and 80 % quantiles, under the names that rows use."""
    middle, low, high = torch.tensor(list(seconds), dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return {"seconds": middle.item(), "low_seconds": low.item(), "high_seconds": high.item()}
