"""The log at Weights & Biases. The last tests use the real package, offline, where it is installed; the others use a
stand-in that only keeps what it is given."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vpo_engine import train
from vpo_engine.config_file import load_config
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import HeldOutGallery, read_held_out, write_held_out
from vpo_engine.runs.log import RunLog, read_metrics
from vpo_engine.runs.wandb_log import check_wandb

CONFIG = "name: small\noptimizer:\n  lr: 0.0001\n"


class StandIn(ModuleType):
    """A module with the few names of wandb that the log uses. It keeps what every run was given."""

    class errors(SimpleNamespace):  # noqa: N801
        Error = type("Error", (Exception,), {})

    Settings = SimpleNamespace

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # other packages ask whether wandb is installed
        self.starts: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.exit_codes: list[int] = []
        self.Video = lambda file: Path(file).read_bytes()

    def init(self, **given: Any) -> SimpleNamespace:
        self.starts.append(given)
        return SimpleNamespace(
            log=self.rows.append,
            define_metric=lambda name, step_metric=None: self.axes.append((name, step_metric)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )

    def login(self) -> None:
        raise self.errors.Error("api_key not configured (no-tty)")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create_at(tmp_path / "small-1", CONFIG)


def write_clips(run: RunDirectory, count: int = 2) -> None:
    clips = torch.arange(count * 3, dtype=torch.uint8).view(count, 3, 1, 1, 1).expand(count, 3, 64, 32, 3)
    scores = [{"visual_quality": 1.0}] * count
    prompts = [f"a ball,/number: {number}" for number in range(count)]
    write_held_out(
        run.held_out_gallery, HeldOutGallery(clips, 255 - clips, prompts, scores, scores, 8, "3 steps")
    )


def test_rows_go_there_under_the_names_that_tensorboard_has(wandb, run):
    with RunLog(run, "team/dpo") as log:
        log.write(1, "train", {"loss": 0.5, "reward/selected": 2.0})
        log.write(1, "eval", {"held_out/reward/selected": 3.0})
    start = wandb.starts[0]
    assert (start["entity"], start["project"], start["name"]) == ("team", "dpo", "small-1")
    assert (start["dir"], start["config"]) == (str(run.root), {"name": "small", "optimizer": {"lr": 0.0001}})
    assert wandb.rows == [
        {"step": 1, "train/loss": 0.5, "reward/selected": 2.0},
        {"step": 1, "held_out/reward/selected": 3.0},
    ]
    assert wandb.axes == [("step", None), ("*", "step")]
    assert wandb.exit_codes == [0]


def test_a_resumed_run_goes_on_there_and_sends_no_step_twice(wandb, run):
    with RunLog(run, "dpo") as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": step})
    for _ in range(
        2
    ):  # the second time, metrics.jsonl no longer has the rows that the first resumption deleted
        with RunLog(run, "dpo") as log:
            log.resume(1, last=9)
    with RunLog(run, "dpo") as log:
        log.resume(1, last=9)
        for step in (2, 3, 4):
            log.write(step, "train", {"loss": step})
    assert [row["step"] for row in wandb.rows] == [1, 2, 3, 4]
    assert len({start["id"] for start in wandb.starts}) == 1
    assert {start["resume"] for start in wandb.starts} == {"allow"}
    other = RunDirectory.create_at(run.root.parent / "small-2", CONFIG)
    RunLog(other, "dpo").close()
    assert wandb.starts[-1]["id"] != wandb.starts[0]["id"]


def test_held_out_clips_go_there_once_as_mp4(wandb, run):
    write_clips(run)
    for _ in range(2):
        with RunLog(run, "dpo") as log:
            log.show_held_out(48)
    (row,) = wandb.rows
    assert row.pop("step") == 48
    assert list(row) == ["held_out_clips/00 a ball, number 0", "held_out_clips/01 a ball, number 1"]
    assert all(video[4:8] == b"ftyp" for video in row.values())


def test_videos_of_an_evaluation_go_there_beside_the_held_out_clips_of_the_same_step(wandb, run):
    write_clips(run)
    video = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    for _ in range(2):
        with RunLog(run, "dpo") as log:
            log.show_samples(48, ["a ball"], [video], 8)
            log.show_held_out(48)
    samples, held_out = wandb.rows
    assert list(samples) == ["step", "samples/00 a ball"]
    assert samples["samples/00 a ball"][4:8] == b"ftyp"
    assert len(held_out) == 3


def test_an_error_is_told(wandb, run):
    with pytest.raises(RuntimeError, match="diverged"), RunLog(run, "dpo"):
        raise RuntimeError("diverged")
    assert wandb.exit_codes == [1]


def test_without_a_login_it_is_said_at_the_start(wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"log.wandb=dpo: wandb cannot log in \(api_key.*WANDB_MODE=offline"):
        check_wandb("dpo")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("dpo")


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()  # wandb makes such a folder, which then looks like the package
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    kept = [entry for entry in sys.path if not (Path(entry) / "wandb" / "__init__.py").is_file()]
    monkeypatch.setattr(sys, "path", ["", *kept])
    monkeypatch.setitem(sys.modules, "vpo_engine.training", None)  # importing it would be another error
    assert train.main(["log.wandb=dpo", "run_dir=run"]) == 1
    assert 'log.wandb=dpo needs the package wandb: pip install "vpo-engine[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["true", "1", "a/b/c", "what?", "x" * 129])
def test_what_is_no_name_of_a_project_is_refused(name):
    with pytest.raises(ValueError, match=r"log\.wandb"):
        load_config(None, [f"log.wandb={name}"])
    assert load_config(None, ["log.wandb=null"]).log.wandb is None
    assert load_config(None, ["log.wandb=team/video-dpo"]).log.wandb == "team/video-dpo"


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_sends_its_rows_and_its_clips_at_the_end(wandb, smallest, small_policy, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    small = [*smallest, small_policy, "steps=2", "evaluation.every=null"]
    run = RunDirectory(tmp_path / "run")
    assert train.main([*small, f"run_dir={run.root}", "log.wandb=team/dpo"]) == 0
    *rows, clips = [row for row in wandb.rows if not any(name.startswith("samples/") for name in row)]
    samples = [row for row in wandb.rows if any(name.startswith("samples/") for name in row)]
    assert [row["step"] for row in samples] == [0, 2]
    assert (
        [row["step"] for row in rows]
        == [int(row["step"]) for row in read_metrics(run.metrics)]
        == [0, 1, 2, 2]
    )
    assert "train/loss" in rows[1]
    assert len(clips) == 1 + len(read_held_out(run.held_out_gallery).prompts)
    assert wandb.exit_codes == [0]
    for log in ("log.wandb=null", "log.wandb=other"):
        assert train.main([*small, f"run_dir={run.root}", log]) == 0


REAL = """
import sys
from collections.abc import Iterator
from pathlib import Path
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.log import RunLog
run = RunDirectory.open(Path(sys.argv[1]))
with RunLog(run, "dpo") as log:
    for step in map(int, sys.argv[2:]):
        log.write(step, "train", {"loss": step / 2})
    log.show_held_out(3)
"""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_package_writes_an_offline_run_and_goes_on_with_it(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_clips(run, 1)
    for steps in (["1", "2"], ["2", "3"]):
        done = subprocess.run(
            [sys.executable, "-c", REAL, str(run.root), *steps], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    rows = [
        row for file in sorted((run.root / "wandb").glob("offline-run-*/*.wandb")) for row in history(file)
    ]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 0.5),
        (2, 1),
        (3, 1.5),
    ]
    (videos,) = [row for row in rows if "train/loss" not in row]
    assert videos["held_out_clips/00 a ball, number 0/_type"] == "video-file"
    run_id = run.wandb.read_text().splitlines()[0]
    assert {folder.name.rpartition("-")[2] for folder in (run.root / "wandb").glob("offline-run-*")} == {
        run_id
    }


def history(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a log file of wandb, without its own entries."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for entry in entries(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(entry)
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def entries(content: bytes) -> Iterator[bytes]:
    """Yield the entries of a log in LevelDB's format, behind wandb's header of 7 bytes: blocks of 32 KiB, in which each
    part has a checksum, its length and its place in the entry (1 whole, 2 first, 3 middle, 4 last)."""
    place, entry = 7, b""
    while place + 7 <= len(content):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


def test_the_evaluation_at_the_end_that_is_made_again_is_not_sent_twice(wandb, run):
    with RunLog(run, "dpo") as log:
        log.write(2, "train", {"loss": 0.5})
        log.write(2, "eval", {"held_out/reward/selected": 3.0})
    with RunLog(run, "dpo") as log:
        assert not log.resume(2, last=2)
        log.write(2, "eval", {"held_out/reward/selected": 3.0})
    assert [list(row)[1] for row in wandb.rows] == ["train/loss", "held_out/reward/selected"]
    assert [row["kind"] for row in read_metrics(run.metrics)] == ["train", "eval"]
