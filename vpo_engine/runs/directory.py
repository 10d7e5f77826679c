"""The run directory, which holds all files of one run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vpo_engine.full_disk import write_whole
from vpo_engine.runs.lock import LOCK_NAME

CONFIG_NAME = "config.yaml"
"""A folder is a run directory if it has this file."""
RUNS, LATEST = "runs", "latest"
"""The folder of new runs, and the link in it that leads to the newest one."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run, as laid out in docs/run_directory.md."""

    root: Path

    @classmethod
    def create(cls, label: str, config_yaml: str, *, parent: Path = Path(RUNS)) -> RunDirectory:
        """Make the directory ``parent/<label>-<date>-<time>``; append ``-2``, ``-3``, ... if that name is taken."""
        stem = f"{slug(label)}-{datetime.now():%Y%m%d-%H%M%S}"
        parent.mkdir(parents=True, exist_ok=True)
        name, attempt = stem, 1
        while True:
            try:
                (parent / name).mkdir()
            except FileExistsError:
                attempt += 1
                name = f"{stem}-{attempt}"
            else:
                return cls.create_at(parent / name, config_yaml)

    @classmethod
    def create_at(cls, root: Path, config_yaml: str) -> RunDirectory:
        """Make a run directory at exactly ``root``, which must be absent or empty (ValueError otherwise).

        In a folder ``runs``, the link ``latest`` leads to it from now on.
        """
        if root.exists():
            cls.refuse_occupied(root)
        root.mkdir(parents=True, exist_ok=True)
        run = cls(root)
        run.write_config(config_yaml)
        if root.absolute().parent.name == RUNS:
            _point_to_latest(root.absolute())
        return run

    @classmethod
    def open(cls, root: Path) -> RunDirectory:
        """Open the existing run at ``root``; ValueError if there is none."""
        if not root.is_dir():
            raise ValueError(f"there is no run directory at '{root}'; check the path, or start a new run")
        if not (root / CONFIG_NAME).is_file():
            raise ValueError(
                f"'{root}' is not a run directory: it has no {CONFIG_NAME}; give the folder that a run wrote"
            )
        return cls(root)

    @staticmethod
    def refuse_occupied(root: Path) -> None:
        """Raise ValueError if ``root`` is a file, or a directory with anything in it that a start does not leave."""
        if not root.is_dir():
            raise ValueError(
                f"cannot start a run at '{root}': there is a file with that name; choose another name"
            )
        if holds_nothing(root):
            return
        if (root / CONFIG_NAME).is_file():
            raise ValueError(
                f"'{root}' already holds a run; go on with it by checkpoint.resume=true, or choose another directory "
                "for a new one"
            )
        raise ValueError(
            f"cannot start a run at '{root}': the directory is not empty and was not made by a run; "
            "choose another, or an empty one"
        )

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, which makes the folder a run's; an earlier one is replaced atomically."""
        write_whole(self.config, text, sync=True)
        for folder in (self.checkpoints, self.pairs_gallery, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def preference_dataset(self) -> Path:
        return self.root / "preference_dataset"

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def config(self) -> Path:
        return self.root / CONFIG_NAME

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def alarms(self) -> Path:
        return self.root / "alarms.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Return the file with the run's id at Weights & Biases and the rows that were sent there."""
        return self.root / "wandb.txt"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def held_out_gallery(self) -> Path:
        return self.root / "gallery" / "held_out.safetensors"

    @property
    def pairs_gallery(self) -> Path:
        return self.root / "gallery" / "pairs"

    def pairs_file(self, step: int) -> Path:
        return self.pairs_gallery / f"step_{step:08d}.safetensors"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def _point_to_latest(root: Path) -> None:
    """Let the link ``latest`` beside ``root`` lead to it. Where links are not possible, there is none."""
    link, unfinished = root.with_name(LATEST), root.with_name(f".{LATEST}.{os.getpid()}")
    if link.exists() and not link.is_symlink():
        return
    try:
        unfinished.symlink_to(root.name, target_is_directory=True)
        unfinished.replace(link)
    except OSError:
        unfinished.unlink(missing_ok=True)


def holds_nothing(root: Path) -> bool:
    """Return whether a folder has at most what a start leaves that ended before its configuration was in place."""
    return all(item.name in (LOCK_NAME, f".{CONFIG_NAME}.tmp") for item in root.iterdir())


def slug(label: str) -> str:
    """Keep only letters, digits, dots and dashes, so that the name is valid on every file system."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")
    if not name:
        raise ValueError(f"the name of a run must have a letter or a digit, got {label!r}")
    return name
