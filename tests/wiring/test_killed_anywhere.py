"""Kills by SIGKILL at chosen places, twice at each: every restart goes on, and the end is an undisturbed run's."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import engine
import pytest
import safetensors.torch
import torch
from power_cut import disk_events
from process_group import fork_server
from test_resume import assert_same

from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.metrics.held_out import HeldOut
from vpo_engine.reference.store import HeldReference
from vpo_engine.runs.checkpoint import complete_checkpoints, verify_checkpoint
from vpo_engine.runs.log import RunLog

STEPS = 40
SETTINGS = (
    f"steps={STEPS}",
    "objective.micro_batch_size=2",
    "reference.refresh_every=2",
    "evaluation.every=4",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "pairs.dataset=latents",
)
PLACES: dict[str, tuple[Any, str, int]] = {
    "rollout": (StopPoints, "check", 25),
    "backward": (torch.Tensor, "backward", 5),
    "refresh": (HeldReference, "refresh", 1),
    "evaluation": (HeldOut, "evaluate", 1),
    "log": (RunLog, "write", 3),
    "save: half a file": (safetensors.torch, "save_file", 6),
    "save: sync": (os, "fsync", 14),
    "save: rename": (os, "rename", 2),
    "save: removal of an old one": (shutil, "rmtree", 2),
}
"""Places where a process is killed: owner and name of a function, and within how many calls of it."""


def attempt(folder: Path, settings: tuple[str, ...], place: str | None, call: int) -> int:
    """Go on with the run; be killed at call number ``call`` of the function of ``place``."""
    if place is not None:
        owner, name, _ = PLACES[place]
        original, calls = getattr(owner, name), 0

        def deadly(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                if name == "save_file":
                    original(*args, **options)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, deadly)
    torch.set_num_threads(1)
    engine.train(engine.make_config(folder, *settings))
    return 0


def run_once(folder: Path, settings: tuple[str, ...], place: str | None = None, call: int = 0) -> int | None:
    process = fork_server().Process(target=attempt, args=(folder, settings, place, call), daemon=True)
    process.start()
    process.join(600)
    return process.exitcode


@pytest.mark.long
@pytest.mark.parametrize(
    ("background", "storage"),
    [
        ("false", ("reference.storage=exact8", "memory.weights=fp32_master")),
        ("true", ("reference.storage=copy",)),
    ],
)
def test_kill_9_at_eighteen_places(background: str, storage: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*SETTINGS, *storage)
    assert run_once(tmp_path / "whole", settings) == 0
    settings = (*settings, f"checkpoint.background={background}")
    run, newest, killed, met = tmp_path / "again/run", 0, 0, set()
    choose = random.Random(background)
    while killed < 2 * len(PLACES):
        place = list(PLACES)[killed % len(PLACES)]
        code = run_once(tmp_path / "again", settings, place, choose.randint(1, PLACES[place][2]))
        assert code == -signal.SIGKILL, f"{place} was not met after step {newest}: exit code {code}"
        killed += 1
        met.add(place)
        saved = complete_checkpoints(run / "checkpoints")
        for path in saved.values():
            verify_checkpoint(path)
        assert max(saved, default=0) >= newest, "a checkpoint was lost"
        newest = max(saved, default=0)
    assert met == PLACES.keys()
    assert 0 < newest < STEPS, "the kills came within the run"
    assert run_once(tmp_path / "again", settings) == 0
    assert_same(tmp_path / "whole/run", run, STEPS)
    assert not list((run / "checkpoints").glob(".*"))


def test_rows_and_pairs_are_on_the_disk_before_the_checkpoint_of_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves the checkpoint alone, and nobody makes that step again."""
    done = disk_events(monkeypatch)
    engine.train(engine.make_config(tmp_path, "steps=1"))
    before = set(done[: done.index(".step_00000001.unfinished")])
    assert {"config.yaml", "metrics.jsonl", "pairs_0000.jsonl", "step_00000001_0000.safetensors"} <= before
