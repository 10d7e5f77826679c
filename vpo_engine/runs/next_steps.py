"""Next steps for a person: the commands after a finished run, and advice after one that diverged."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.runs.directory import RunDirectory


def going_on(run: RunDirectory) -> str:
    """Return the command that goes on with a run, on as many processes of this machine as now."""
    root, config = shlex.quote(str(run.root)), shlex.quote(str(run.config))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    launch = "torchrun" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    return f"{launch} -m vpo_engine.train {config} run_dir={root}"


def closing_lines(run: RunDirectory) -> str:
    """Return the commands that open, sample, compare, follow and resume a run, a line each with what it is for."""
    root = shlex.quote(str(run.root))
    steps = load_config(run.config).steps
    commands = {
        "open its report": shlex.quote(str(run.report)),
        "sample from it": f"python -m vpo_engine.sample {root} --out clips",
        "compare it with other runs": f"python -m vpo_engine.evaluate {root} OTHER_RUN",
        "see its curves": f"tensorboard --logdir {shlex.quote(str(run.root.parent))}",
        "go on to more steps": f"{going_on(run)} steps={2 * steps}",
    }
    width = max(map(len, commands)) + 1
    return "\n".join(f"{f'{meaning}:':<{width}} {command}" for meaning, command in commands.items())


def after_divergence(
    settings: Config, where: str, error: Exception, norm: float | None, last: Path | None
) -> str:
    """Return what is known about a policy that has diverged, and what to do.

    where: "in step 3", for example. norm: the last gradient norm; None if there is none. last: the last complete
    checkpoint; None without one.
    """
    paired = settings.card.pairs
    beta = f", objective.beta={settings.objective.beta:g}" if paired else ""
    numbers = "" if norm is None else f", the last gradient norm was {norm:.3g}"
    saved = "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"
    whole = last is not None and settings.model.lora is None
    start = f", for example from model.policy={last}/policy" if whole else ""
    return (
        f"the policy has diverged {where}: {error}; optimizer.lr={settings.optimizer.lr:g}{beta}{numbers}; "
        f"{saved}. Start a run with a lower optimizer.lr{' or objective.beta' if paired else ''}{start}"
    )
