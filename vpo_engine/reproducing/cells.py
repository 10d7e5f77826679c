"""A cell of a grid: one piece of work, its folder, and the record by which a finished cell is known again."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import vpo_engine
from vpo_engine.config import Config
from vpo_engine.config_file import dump_config, load_config, parse_config
from vpo_engine.full_disk import write_whole
from vpo_engine.runs.readable import readable
from vpo_engine.runs.start import differences, show_value
from vpo_engine.texts import read_json, shortened

Kind = Literal["run", "base", "ranking", "memory"]
RECORD, RESULT, RUN, LOG = "cell.json", "result.json", "run", "log.txt"
_SLUG = 60
"""Most letters of the settings in the name of a folder; a digest makes the name unique."""
_WITHOUT_EFFECT = ("name", "run_dir", "log", "checkpoint", "prompts.cache")
"""Settings that change no result."""
_ROOT = Path(vpo_engine.__file__).parent


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    kind: run trains and measures; base measures the policy that runs start from; ranking ranks groups of clips; memory
    plans a run. settings: overrides of the configuration (for a ranking: its own words); of several of one key the last
    is kept, and they are sorted, so that equal work is an equal cell. source: the configuration file.
    """

    kind: Kind
    settings: tuple[str, ...]
    seed: int
    source: str = "sprites_fast.yaml"

    def __post_init__(self) -> None:
        kept = tuple(f"{key}={value}" for key, value in sorted(self.values().items()))
        object.__setattr__(self, "settings", kept)

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        given = [f"{key.rpartition('.')[2]}={value}" for key, value in self.values().items()]
        words = re.sub(r"[^A-Za-z0-9.=]+", "-", "-".join(given)).strip("-")[:_SLUG].rstrip("-.")
        text = json.dumps([self.kind, self.source, self.settings])
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return "-".join(filter(None, [self.kind, words or "default", digest, f"seed{self.seed}"]))

    def values(self) -> dict[str, str]:
        """Return the settings by key."""
        return {key: value for key, _, value in (word.partition("=") for word in self.settings)}

    def config(self) -> Config:
        """Return the resolved configuration. ValueError if a setting is wrong."""
        return _load(self.source, (*self.settings, f"seed={self.seed}"))

    def resolved(self) -> str:
        """Return what the cell does, as text: its configuration as YAML, or the words of a ranking."""
        if self.kind == "ranking":
            return "\n".join([*self.settings, f"seed={self.seed}"])
        return dump_config(self.config())


@cache
def _load(source: str, settings: tuple[str, ...]) -> Config:
    """Return a configuration, which is asked for several times in the life of a cell."""
    return load_config(source, settings)


@dataclass
class Record:
    """The record of a cell that was begun; ``cell.json`` in its folder.

    code: the version of the code that made it, see ``code_version``. seconds: what each of its commands took in all
    attempts together, {command: [processor seconds, seconds by the clock]}.
    """

    kind: str
    source: str
    settings: list[str]
    seed: int
    resolved: str
    code: str
    commit: str
    machine: str
    finished: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)
    attempts: int = 0
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))

    @classmethod
    def of(cls, cell: Cell) -> Record:
        """Return the record of a cell that has just begun."""
        settings = list(cell.settings)
        return cls(
            cell.kind,
            cell.source,
            settings,
            cell.seed,
            cell.resolved(),
            code_version(),
            commit(),
            machine_name(),
        )

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Return the record in ``folder``; None without one. ValueError if it is damaged."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            record = cls(**read_json(path))
            record.check()
            return record
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({shortened(str(error))}); remove {folder}, and its cell is made again"
            ) from None

    def check(self) -> None:
        """Raise TypeError if a field has another type than a runner writes."""
        texts = (self.kind, self.source, self.resolved, self.code, self.commit, self.machine, self.made)
        numbers = [each for pair in self.seconds.values() for each in pair]
        if not all(isinstance(text, str) for text in (*texts, *self.settings)):
            raise TypeError("a text is none")
        if {type(self.finished), type(self.seed), type(self.attempts)} != {bool, int}:
            raise TypeError("finished, seed or attempts is no such value")
        if any(len(pair) != 2 for pair in self.seconds.values()) or not all(
            type(number) in (int, float) and 0 <= number < 1e100 for number in numbers
        ):
            raise TypeError(f"seconds is {self.seconds}")

    def write(self, folder: Path) -> None:
        """Write the record, replacing an earlier one at once."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD, json.dumps(asdict(self), indent=1))

    def took(self, command: str) -> tuple[float, float]:
        """Return the processor seconds and the seconds by the clock that a command of the cell took."""
        processor, clock = self.seconds.get(command, (0.0, 0.0))
        return processor, clock

    def add(self, command: str, processor: float, clock: float) -> None:
        """Add what one attempt of a command took."""
        before = self.took(command)
        self.seconds[command] = [before[0] + processor, before[1] + clock]

    def differs(self, cell: Cell) -> str | None:
        """Return in what the recorded work differs from what the cell would do today; None if in nothing."""
        if changed := _changed(self.resolved, cell):
            return changed
        if self.code != code_version():
            return f"made by other code, {self.code} at commit {self.commit}; this is {code_version()} at {commit()}"
        return None


def _changed(resolved: str, cell: Cell) -> str | None:
    """Return which settings were others when the cell was made; a setting that did not exist then had its default."""
    now = cell.resolved()
    if resolved == now:
        return None
    if cell.kind == "ranking":
        return f"other words: {resolved.split()} -> {now.split()}"
    try:
        before = parse_config(resolved, "the cell's configuration")
    except ValueError as error:
        return f"its configuration is no longer valid: {error}"
    found = [
        f"{key}: {show_value(old)} -> {show_value(new)}"
        for key, old, new in differences(before, cell.config())
        if not any(key == name or key.startswith(f"{name}.") for name in _WITHOUT_EFFECT)
    ]
    return f"made with other settings (then -> now): {'; '.join(found)}" if found else None


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of a finished cell's ``result.json``. ValueError if it is damaged."""
    with readable(folder / RESULT, f"remove {folder}, and its cell is made again"):
        return dict(read_json(folder / RESULT))


@cache
def code_version() -> str:
    """Return a short digest of everything that results depend on: the code and the shipped weights.

    Files that only write tables, and documents, do not count.
    """
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _sources() -> Iterable[Path]:
    here = Path(__file__).parent
    made = {here / f"{name}.py" for name in ("measuring", "ranking", "planned")}
    for path in sorted(_ROOT.rglob("*")):
        if path.suffix in (".py", ".safetensors") and (here not in path.parents or path in made):
            yield path


@cache
def machine_name() -> str:
    """Return the name of the processor and the version of torch, without importing it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
        name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), name)
    return f"{name}, torch {version('torch')}"


@cache
def commit() -> str:
    """Return git's name of the commit, with "+dirty" if the package's files differ; "unknown" outside a checkout."""
    top = _git("rev-parse", "--show-toplevel")
    name = _git("describe", "--tags", "--always") if top and Path(top) == _ROOT.resolve().parent else None
    if name is None:
        return "unknown"
    return name + ("+dirty" if _git("status", "--porcelain", "-uno", "--", str(_ROOT)) else "")


def _git(*words: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()
