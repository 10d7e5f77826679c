"""Decide how a run begins: in a new directory, or from a checkpoint. Nothing heavy is imported here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_engine.config import Config, Section
from vpo_engine.config.presets import MEMORY_PRESETS
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.runs.attempts import has_saved, was_cut_short
from vpo_engine.runs.checkpoint import checkpoint_name, complete_checkpoints, unusable_checkpoints
from vpo_engine.runs.directory import CONFIG_NAME, RunDirectory, holds_nothing, slug

_FREE_TO_CHANGE = (
    "name",
    "run_dir",
    "steps",
    "evaluation",
    "disk",
    "checkpoint",
    "processes",
    "distributed",
    "log",
    "memory.limit_gib",
    "memory.overcommit",
    "prompts.cache",
)
"""Settings, and sections of them, that may differ when a run is resumed."""
_WHEN = re.compile(r"\d+(-\d{6}(-\d+)?)?")
"""The end of a run directory's name behind the run's: date, time, and a number where that was taken."""


@dataclass(frozen=True)
class Start:
    """The place that a run begins from.

    root: the run directory; None for a new one under runs/. checkpoint: the one to go on from; None to begin at the
    first step. exists: whether ``root`` holds this run already. finished: whether its last step is done.
    """

    root: Path | None
    checkpoint: Path | None = None
    exists: bool = False
    finished: bool = False

    def open(self, config: Config) -> RunDirectory:
        """Open the run directory, or make it; the saved configuration becomes ``config``."""
        beginning = config.checkpoint.model_copy(update={"resume": "auto", "from_": None})
        text = dump_config(config.model_copy(update={"checkpoint": beginning}))
        if self.exists:
            assert self.root is not None
            run = RunDirectory.open(self.root)
            run.write_config(text)
            return run
        return (
            RunDirectory.create_at(self.root, text) if self.root else RunDirectory.create(config.name, text)
        )


def find_start(config: Config) -> Start:
    """Decide where a run begins, without writing anything.

    ValueError if there is nothing to resume although checkpoint.resume=true or checkpoint.from ask for it, if the run
    that is there was made with other settings, if none of its checkpoints is complete, or if another run is there and
    checkpoint.resume=false.
    """
    settings = config.checkpoint
    asked = settings.resume is True or settings.from_ is not None
    root = _root(config, asked)
    if root is None or _is_empty(root):
        if asked:
            raise ValueError(_nothing_there(root, config.name))
        return Start(root)
    if not (root / CONFIG_NAME).is_file() or settings.resume is False:
        RunDirectory.refuse_occupied(root)
    check_same_run(config, root / CONFIG_NAME)
    run = RunDirectory.open(root)
    saved = complete_checkpoints(run.checkpoints)
    if not saved:
        broken = unusable_checkpoints(run.checkpoints)
        if asked or broken:
            why = f": {'; '.join(broken)}" if broken else ", because the run ended before it saved one"
            raise ValueError(
                f"{root} has no complete checkpoint to go on from{why}. Start the run again in another run_dir"
            )
        return Start(root, exists=True)
    chosen = _chosen(config, saved, root)
    newest = max(saved)
    at_end = newest == config.steps and settings.from_ is None
    finished = at_end and run.summary.is_file() and not was_cut_short(run)
    if newest > config.steps and settings.from_ is None:
        raise ValueError(f"{saved[newest]} is at step {newest}, beyond steps={config.steps}; raise steps")
    return Start(root, chosen, exists=True, finished=finished)


def check_same_run(config: Config, saved_config: Path) -> None:
    """Raise ValueError if ``config`` does not continue the run whose resolved configuration is at ``saved_config``."""
    saved = load_config(saved_config)
    config = resolved_as_before(config, saved)
    different = [
        f"{key}: {show_value(before)} -> {show_value(now)}"
        for key, before, now in differences(saved, config)
        if key not in _FREE_TO_CHANGE and key.partition(".")[0] not in _FREE_TO_CHANGE
    ]
    if saved.held_out_steps != config.held_out_steps:
        different.append(
            f"evaluation.steps: {saved.held_out_steps} -> {config.held_out_steps}, and the base was evaluated so"
        )
    for name in ("samples_per_prompt", "prompts"):
        before, now = getattr(saved.evaluation, name), getattr(config.evaluation, name)
        if before != now:
            changed = f"{show_value(before)} -> {show_value(now)}"
            different.append(f"evaluation.{name}: {changed}, and the base was evaluated so")
    if different:
        raise ValueError(
            f"{saved_config.parent} holds a run with other settings (there -> now): {'; '.join(different)}. Resume it "
            f"with its own settings (only {', '.join(_FREE_TO_CHANGE)} may change, but not evaluation.steps, "
            "evaluation.samples_per_prompt and evaluation.prompts), or give another run_dir"
        )


def resolved_as_before(config: Config, saved: Config) -> Config:
    """Return ``config`` with what the plan of the run's first start chose: rollout.batch_size=auto, and the memory
    settings of memory.preset=balanced. A resumed run keeps them, however much memory is free now."""
    sections: dict[str, Section] = {}
    if config.rollout.batch_size == "auto":
        sections["rollout"] = config.rollout.model_copy(update={"batch_size": saved.rollout.batch_size})
    if config.memory.preset == saved.memory.preset == "balanced":
        names = [name for name in MEMORY_PRESETS["lean"] if config.memory.chooses(name)]
        chosen = {name: getattr(saved.memory, name) for name in names}
        sections["memory"] = config.memory.model_copy(update=chosen)
    return config.model_copy(update=sections) if sections else config


def differences(one: Section, other: Section, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value in ``one``, value in ``other``) for every setting that differs."""
    for name, field in type(one).model_fields.items():
        before, now, key = getattr(one, name), getattr(other, name), prefix + (field.alias or name)
        if before == now:
            continue
        if isinstance(before, Section) and type(before) is type(now):
            yield from differences(before, now, f"{key}.")
        else:
            yield key, before, now


def show_value(value: Any) -> str:
    """Return a setting as it is written in YAML."""
    if isinstance(value, Section):
        return "set"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _root(config: Config, asked: bool) -> Path | None:
    """Return the run directory: as configured, that of checkpoint.from, or the newest of this name to go on with."""
    chosen = config.checkpoint.from_
    if isinstance(chosen, Path):
        own = chosen.resolve().parent.parent
        if not (own / CONFIG_NAME).is_file():
            raise ValueError(
                f"checkpoint.from={chosen} is no checkpoint of a run; give its step, or a folder "
                "RUN_DIRECTORY/checkpoints/step_..."
            )
        if config.run_dir is not None and config.run_dir.resolve() != own:
            raise ValueError(
                f"checkpoint.from={chosen} is a checkpoint of the run {own}, but run_dir={config.run_dir}; a run "
                "goes on from its own checkpoints. Leave run_dir out, or start a new run from that policy with "
                f"model.policy={chosen / 'policy'}"
            )
        return own
    if config.run_dir is not None:
        return config.run_dir
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not (asked or (restarted and config.checkpoint.resume is not False)):
        return None
    stem = f"{slug(config.name)}-"
    earlier = [
        path
        for path in Path("runs").glob(f"{stem}*/{CONFIG_NAME}")
        if _WHEN.fullmatch(path.parent.name.removeprefix(stem))  # not of a longer name
    ]
    newest = max(earlier, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def _is_empty(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and holds_nothing(root))


def _nothing_there(root: Path | None, name: str) -> str:
    if root is None:
        return (
            f"there is no run to resume: no directory runs/{name}-* holds one; give its run_dir, or leave out "
            "checkpoint.resume=true to start a new run"
        )
    others = root.parent.iterdir() if root.parent.is_dir() else []
    runs = [path.name for path in others if (path / CONFIG_NAME).is_file()]
    near = difflib.get_close_matches(root.name, runs, n=1)
    hint = f"; did you mean {root.parent / near[0]}?" if near else "; check run_dir,"
    return f"there is no run to resume at {root}{hint} or leave out checkpoint.resume=true to start a new run there"


def _chosen(config: Config, saved: dict[int, Path], root: Path) -> Path:
    """Return the checkpoint that checkpoint.from names; the newest without it, or once the run has gone on from it."""
    wanted = config.checkpoint.from_
    if wanted is None or has_saved(root):
        return saved[max(saved)]
    for step, path in saved.items():
        if step == wanted or (isinstance(wanted, Path) and path.resolve() == wanted.resolve()):
            if step > config.steps:
                raise ValueError(f"{path} is at step {step}, beyond steps={config.steps}; raise steps")
            return path
    known = ", ".join(str(step) for step in sorted(saved))
    name = checkpoint_name(wanted) if isinstance(wanted, int) else wanted
    raise ValueError(
        f"checkpoint.from={wanted}: {root} has no complete checkpoint {name}; it has those of steps {known}"
    )
