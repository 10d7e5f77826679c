"""Checkpoints that are written in the background are those that are written while training waits."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
import pytest
import safetensors.torch
from test_resume import assert_same

from vpo_engine.errors import CheckpointError, NotFiniteError
from vpo_engine.method import Step
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.runs import saving
from vpo_engine.runs.disk_use import DiskWatch
from vpo_engine.runs.saving import CheckpointSaver
from vpo_engine.values import Prompt

SETTINGS = (
    "steps=4",
    "objective.updates_per_rollout=2",
    "reference.refresh_every=3",
    "evaluation.every=2",
    "checkpoint.every=1",
    "checkpoint.keep=9",
)
BACKGROUND = "checkpoint.background=true"
STORAGES = {
    "copy": (),
    "exact": ("reference.storage=exact8", "memory.weights=fp32_master"),
}


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer begin only when the run waits for it: after the next step, which has changed everything."""
    waited, write, settle = threading.Event(), saving.save_checkpoint, CheckpointSaver.settle

    def write_late(*args: Any, **parts: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert waited.wait(300)
            waited.clear()
        write(*args, **parts)

    def settle_now(saver: CheckpointSaver) -> None:
        if saver._thread is not None:
            waited.set()
        settle(saver)

    monkeypatch.setattr(saving, "save_checkpoint", write_late)
    monkeypatch.setattr(CheckpointSaver, "settle", settle_now)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_file_is_the_same_byte_for_byte(storage: str, tmp_path: Path, late: None) -> None:
    settings = (*SETTINGS, *STORAGES[storage])
    engine.train(engine.make_config(tmp_path, *settings))
    other = f"run_dir={tmp_path / 'other'}"
    engine.train(engine.make_config(tmp_path, *settings, BACKGROUND, other))
    assert files_of(tmp_path / "other") == files_of(tmp_path / "run")
    assert len(list((tmp_path / "other/checkpoints").iterdir())) == 4
    assert_same(tmp_path / "run", tmp_path / "other", 4)


def test_a_signal_while_a_checkpoint_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.train(engine.make_config(tmp_path, *SETTINGS))
    save, saved = CheckpointSaver.save, []

    def then_stop(saver: CheckpointSaver, step: int, **parts: Any) -> None:
        save(saver, step, **parts)
        saved.append(step)
        if len(saved) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(CheckpointSaver, "save", then_stop)
    config = engine.make_config(tmp_path, *SETTINGS, BACKGROUND, f"run_dir={tmp_path / 'other'}")
    engine.train(config, exit_code=143)
    assert saved == [1, 2], "the step that is being written is not saved again"
    assert sorted(path.name for path in (tmp_path / "other/checkpoints").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]
    engine.train(config)
    assert_same(tmp_path / "run", tmp_path / "other", 4)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_ends_the_run_at_the_next_step(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, settle = safetensors.torch.save_file, CheckpointSaver.settle

    def refuse(tensors: Any, path: Any, **options: Any) -> None:
        if "step_00000002" in str(path):
            raise OSError(number, os.strerror(number))
        write(tensors, path, **options)

    def at_once(saver: CheckpointSaver) -> None:
        settle(saver)  # the writer has met the error before the next step begins
        check(saver)

    check = CheckpointSaver.check
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", refuse)
        patch.setattr(CheckpointSaver, "check", at_once)
        config = engine.make_config(tmp_path, *SETTINGS, BACKGROUND)
        with pytest.raises(CheckpointError, match=r"could not save checkpoint '.*step_00000002'") as caught:
            engine.train(config)
    assert "Earlier checkpoints are untouched" in str(caught.value)
    run = tmp_path / "run"
    assert [row["step"] for row in engine.metrics_of(run)] == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
    engine.train(config)
    engine.train(engine.make_config(tmp_path, *SETTINGS, f"run_dir={tmp_path / 'whole'}"))
    assert_same(tmp_path / "whole", run, 4)


def test_the_copies_must_fit_into_the_memory_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpo_engine.training.available_memory", lambda: 10)
    with pytest.raises(
        ValueError, match=r"checkpoint\.background=true copies .* 0\.00 GiB are available; set"
    ):
        engine.train(engine.make_config(tmp_path, *SETTINGS, BACKGROUND))
    assert not (tmp_path / "run/checkpoints").exists()
    engine.train(engine.make_config(tmp_path, *SETTINGS, "steps=1"))


def test_a_run_that_diverges_names_the_checkpoint_that_was_still_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: None
) -> None:
    step, steps = OnlineVPO.step, []

    def diverge(algorithm: OnlineVPO, prompts: Sequence[Prompt]) -> Step:
        steps.append(prompts)
        if len(steps) == 2:
            raise NotFiniteError("the loss is inf")
        return step(algorithm, prompts)

    monkeypatch.setattr(OnlineVPO, "step", diverge)
    with pytest.raises(ValueError, match="the policy has diverged in step 2") as caught:
        engine.train(engine.make_config(tmp_path, *SETTINGS, BACKGROUND))
    assert f"the last good checkpoint is {engine.checkpoint(tmp_path / 'run', 1)}." in str(caught.value)


def test_the_room_on_the_disk_is_not_judged_while_a_checkpoint_is_written_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: None
) -> None:
    """A part of the room for it is taken already; after step 1 the checkpoint is still being written."""
    monkeypatch.setattr(DiskWatch, "exhausted", lambda *_: "no room for another checkpoint")
    engine.train(engine.make_config(tmp_path, *SETTINGS, "steps=2", BACKGROUND))


def test_the_average_is_written_in_the_background_as_it_was(tmp_path: Path, late: None) -> None:
    settings = (*SETTINGS, "ema.decay=0.5")
    engine.train(engine.make_config(tmp_path, *settings))
    engine.train(engine.make_config(tmp_path, *settings, BACKGROUND, f"run_dir={tmp_path / 'other'}"))
    waited, written = files_of(tmp_path / "run"), files_of(tmp_path / "other")
    average, policy = (f"step_00000004/{name}/model.safetensors" for name in ("ema", "policy"))
    assert waited[average] != waited[policy]
    assert written == waited
