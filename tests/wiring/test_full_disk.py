"""A disk that becomes full while a run writes: it ends with the file's name, and nothing is half written."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import engine
import pytest
import torch
from full_disk import full_disk

from vpo_engine.distributed.processes import Processes
from vpo_engine.errors import CheckpointError, DiskFullError
from vpo_engine.runs.checkpoint import newest_complete, verify_checkpoint
from vpo_engine.runs.disk_use import SPARE_BYTES, DiskWatch
from vpo_engine.trainer import Trainer

SETTINGS = ("steps=3", "evaluation.every=2", "checkpoint.keep=9")
WRITERS = {
    "config.yaml": 0,
    "metrics.jsonl": 2,
    "pairs_0000.jsonl": 2,
    "step_00000003_0000.safetensors": 2,
    "gallery/pairs": 0,
    "optimizer.safetensors": 0,
    "held_out.safetensors": 3,
    "summary.json": 3,
}
"""What cannot be written, and the last step that is saved then, where the disk is full from step 3 on; 0: from the
first."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    engine.train(engine.make_config(folder, *SETTINGS))
    return folder / "run"


@pytest.mark.parametrize(("name", "saved"), WRITERS.items(), ids=WRITERS)
def test_nothing_is_half_written_and_the_same_command_goes_on(
    name: str, saved: int, whole: Path, tmp_path: Path
) -> None:
    config, run = engine.make_config(tmp_path, *SETTINGS), tmp_path / "run"
    with (
        full_disk(name, step=3 if saved else 0),
        pytest.raises((DiskFullError, CheckpointError), match="the disk is full: could not"),
    ):
        engine.train(config)
    assert not list(run.rglob(".*"))
    newest = newest_complete(run / "checkpoints")
    assert (int(newest.name[-8:]) if newest else 0) == saved
    if newest is not None:
        verify_checkpoint(newest)
    for lines in (run / "metrics.jsonl", run / "preference_dataset/pairs_0000.jsonl"):
        assert not lines.exists() or lines.read_bytes()[-1:] in (b"", b"\n")
    engine.train(config)
    assert engine.metrics_of(run) == engine.metrics_of(whole)
    assert [vars(line) | {"latents_file": None} for line in engine.lines_of(run)] == [
        vars(line) | {"latents_file": None} for line in engine.lines_of(whole)
    ]
    expected = engine.saved_tensors(whole, 3)
    assert all(torch.equal(value, expected[key]) for key, value in engine.saved_tensors(run, 3).items())
    assert engine.summary_of(run) == engine.summary_of(whole)


Disk = Callable[[int], None]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Say how many bytes of the disk are free."""

    def have(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=free))

    return have


def test_a_run_on_a_disk_that_fills_up_is_saved_while_there_is_room(
    disk: Disk,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exhausted = DiskWatch.exhausted

    def fills_up(watch: DiskWatch, step: int) -> str | None:
        disk(10**12 if step < 2 else SPARE_BYTES)
        return exhausted(watch, step)

    disk(10**12)
    monkeypatch.setattr(DiskWatch, "exhausted", fills_up)
    config, run = engine.make_config(tmp_path, *SETTINGS, "checkpoint.every=null"), tmp_path / "run"
    engine.train(config, exit_code=1)
    said = capsys.readouterr()
    assert (
        f"the disk of {run} has 0.06 GiB free, less than the next checkpoint and 0.06 GiB to spare"
        in said.err
    )
    assert "stopped by a disk without room after step 2, which is saved; go on with" in said.out
    assert newest_complete(run / "checkpoints").name == "step_00000002"
    monkeypatch.undo()
    engine.train(config)
    expected = engine.saved_tensors(whole, 3)
    assert all(torch.equal(value, expected[key]) for key, value in engine.saved_tensors(run, 3).items())


def test_the_budget_is_said_at_the_start_and_kept(
    disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError, match=r"disk\.limit_gib=0\.01 allows 0\.01 GiB, but .*, or raise the limit"
    ):
        engine.train(engine.make_config(tmp_path, "disk.limit_gib=0.01"))
    assert not (tmp_path / "run").exists()
    disk(3 * 2**30)
    with pytest.raises(ValueError, match=r"has 3\.00 GiB free, but .*; lower steps=5000000, free some"):
        engine.train(engine.make_config(tmp_path, "steps=5000000", "evaluation.every=null"))
    assert not (tmp_path / "run").exists()


def test_what_others_put_into_the_run_directory_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = engine.make_config(tmp_path, *SETTINGS, "disk.limit_gib=0.1")
    engine.train(engine.make_config(tmp_path, *SETTINGS, "disk.limit_gib=0.1", "steps=1"))
    run = tmp_path / "run"
    watch = DiskWatch(run, 1000, 0.1, 1)
    assert watch.exhausted(1) is None
    (run / "notes").mkdir()
    with (run / "notes" / "copy.bin").open("wb") as file:
        file.truncate(60 * 2**20)
    assert "most is taken by notes (0.06 GiB). Raise the limit" in str(watch.exhausted(1))
    with pytest.raises(
        ValueError, match=r"disk\.limit_gib=0\.1 allows 0\.10 GiB, of which 0\.06 GiB are taken"
    ):
        engine.train(config)
    shutil.rmtree(run / "notes")
    engine.train(config)


def test_latents_are_counted_as_they_come(tmp_path: Path) -> None:
    latents = tmp_path / "preference_dataset" / "latents"
    latents.mkdir(parents=True)
    limit = (SPARE_BYTES + 10_000) / 2**30
    watch = DiskWatch(tmp_path, 1000, limit, writers=2)
    (latents / "step_00000001_0000.safetensors").write_bytes(bytes(3500))
    assert watch.exhausted(1) is None
    for rank in (0, 1):
        (latents / f"step_00000002_{rank:04d}.safetensors").write_bytes(bytes(3500))
    assert "preference_dataset" in str(watch.exhausted(2))


def test_latents_of_all_processes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer of the first of two processes watches what the second one writes, too."""
    made: list[DiskWatch] = []

    def make(*given: Any) -> DiskWatch:
        made.append(DiskWatch(*given))
        return made[0]

    monkeypatch.setattr("vpo_engine.trainer.DiskWatch", make)
    run, algorithm = tmp_path / "run", mock.MagicMock()
    algorithm.model.network = torch.nn.Linear(1, 1)
    config = engine.make_config(tmp_path, f"disk.limit_gib={(SPARE_BYTES + 10_000) / 2**30}")
    given = mock.MagicMock(), mock.MagicMock(), mock.MagicMock(root=run)
    Trainer(config, algorithm, *given, Processes(0, 2, torch.device("cpu")))
    latents = run / "preference_dataset" / "latents"
    latents.mkdir(parents=True)
    (watch,) = made
    assert watch.exhausted(1) is None
    (latents / "step_00000002_0001.safetensors").write_bytes(bytes(10_000))
    assert "preference_dataset" in str(watch.exhausted(2))


def test_a_run_near_its_end_needs_the_room_of_the_rest_only(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step takes 1 GiB here. With 2 GiB free, three steps do not fit, and the third does."""
    engine.train(engine.make_config(tmp_path, *SETTINGS, "steps=2"))
    monkeypatch.setattr("vpo_engine.disk_plan._ROW_BYTES", 2**30)
    disk(2 * 2**30)
    with pytest.raises(ValueError, match=r"has 2\.00 GiB free, but to its last step this run writes 3\."):
        engine.train(engine.make_config(tmp_path, *SETTINGS, f"run_dir={tmp_path / 'new'}"))
    engine.train(engine.make_config(tmp_path, *SETTINGS))
    assert len(engine.metrics_of(tmp_path / "run")) == 3


def test_the_latents_of_a_step_count_once(tmp_path: Path) -> None:
    latents = tmp_path / "preference_dataset" / "latents"
    latents.mkdir(parents=True)
    watch = DiskWatch(tmp_path, 1000, (SPARE_BYTES + 10_000) / 2**30, writers=1)
    for step in range(1, 7):
        (latents / f"step_{step:08d}_0000.safetensors").write_bytes(bytes(1400))
        assert watch.exhausted(step) is None


def test_the_room_for_a_checkpoint_is_that_of_all_weights_where_they_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's stage 3 leaves nothing in a weight outside of ``whole``."""
    network, algorithm, sizes = torch.nn.Linear(100, 100), mock.MagicMock(), list[int]()
    kept = [parameter.data for parameter in network.parameters()]

    @contextmanager
    def whole() -> Iterator[None]:
        for parameter, data in zip(network.parameters(), kept, strict=True):
            parameter.data = data
        yield
        for parameter in network.parameters():
            parameter.data = torch.empty(0)

    with whole():
        pass
    monkeypatch.setattr("vpo_engine.trainer.DiskWatch", lambda root, size, *_: sizes.append(size))
    algorithm.model.network, algorithm.model.video_size, algorithm.optimizer.whole = network, None, whole
    given = mock.MagicMock(), mock.MagicMock(), mock.MagicMock(root=tmp_path / "run")
    Trainer(engine.make_config(tmp_path), algorithm, *given, Processes(0, 1, torch.device("cpu")))
    assert sizes == [16 * 10_100]  # policy, both moments and the reference, of 10,100 float32 weights


def test_latents_that_another_process_writes_late_are_counted(tmp_path: Path) -> None:
    """The first process looks after its own step 2, before the other one has written its file of that step."""
    latents = tmp_path / "preference_dataset" / "latents"
    latents.mkdir(parents=True)
    watch = DiskWatch(tmp_path, 1000, (SPARE_BYTES + 10_000) / 2**30, writers=2)
    assert watch.exhausted(1) is None
    (latents / "step_00000002_0000.safetensors").write_bytes(bytes(5000))
    assert watch.exhausted(2) is None
    (latents / "step_00000002_0001.safetensors").write_bytes(bytes(5000))
    assert "most is taken by preference_dataset" in str(watch.exhausted(3))


def test_lines_of_pairs_count_and_a_part_that_is_renamed_meanwhile_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preference_dataset").mkdir()
    (tmp_path / "preference_dataset" / "pairs_0000.jsonl").write_bytes(bytes(10_000))
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda at, pattern: [*listed(at, pattern), at / "pairs_0001.jsonl"])
    watch = DiskWatch(tmp_path, 1000, (SPARE_BYTES + 10_000) / 2**30, writers=2)
    assert "most is taken by preference_dataset" in str(watch.exhausted(1))


def test_pairs_that_were_sampled_before_the_first_step_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of the training write no latents, though they have the numbers of those that did."""
    latents = tmp_path / "run/preference_dataset/latents"
    latents.mkdir(parents=True)
    for step in range(1, 5):
        (latents / f"step_{step:08d}_0000.safetensors").write_bytes(bytes(2000))
    monkeypatch.setattr("vpo_engine.trainer.checkpoint_bytes", lambda *_: 1000)
    limit = f"disk.limit_gib={(SPARE_BYTES + 10_000) / 2**30}"
    config = engine.make_config(
        tmp_path, "method=offline_dpo", "pairs.dataset=none", "reference.refresh_every=200", limit
    )
    given = (mock.MagicMock(), mock.MagicMock(), mock.MagicMock(), mock.MagicMock(root=tmp_path / "run"))
    watch = Trainer(config, *given, Processes(0, 1, torch.device("cpu")))._disk
    assert [watch.exhausted(step) for step in range(1, 5)] == [None] * 4
