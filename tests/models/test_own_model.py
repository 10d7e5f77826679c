"""A model of the user's own, by the example and the page: a whole run, its checkpoints, its videos."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from power_cut import copy_cut
from safetensors.torch import load_file

from vpo_engine import sample
from vpo_engine import train as entry
from vpo_engine.models.base import BaseModel
from vpo_engine.runs.log import read_metrics

ROOT = Path(__file__).parents[2]
KIND = "model.kind=examples.own_model:ToyModel"
SHORT = (
    "pairs_per_step=2",
    "rollout.candidates=2",
    "rollout.steps=2",
    "reference.refresh_every=2",
    "evaluation.prompts=2",
    "evaluation.samples_per_prompt=1",
    "evaluation.samples_between=1",
    "evaluation.every=null",
    "checkpoint.every=2",
)


def command(run: Path, *overrides: str) -> list[str]:
    return ["examples/own_model.yaml", KIND, *SHORT, f"run_dir={run}", *overrides]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps by the command of the page, in a process of its own that starts in the repository."""
    run = tmp_path_factory.mktemp("own") / "run"
    outcome = subprocess.run(
        [sys.executable, "-m", "vpo_engine.train", *command(run, "steps=4", "model.device=cpu")],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return run


@pytest.fixture
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def policy(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}" / "policy" / "model.safetensors"


@pytest.mark.long
def test_it_trains_and_starts_from_its_reference(finished: Path) -> None:
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["margin"] == 0.0 for row in rows] == [True, False, True, False]
    first, last = load_file(policy(finished, 2)), load_file(policy(finished, 4))
    assert any((first[name] != last[name]).any() for name in first)
    assert all(row["speed/rollout_mfu"] > 0 for row in rows)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_resumed_run_is_the_uninterrupted_one(
    finished: Path, tmp_path: Path, in_the_repository: None
) -> None:
    run = tmp_path / "run"
    copy_cut(finished, run, 2)
    assert entry.main(command(run, "steps=4", "model.device=cpu", "checkpoint.resume=true")) == 0
    found, expected = load_file(policy(run, 4)), load_file(policy(finished, 4))
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.long
def test_its_videos_are_sampled_from_the_run(
    finished: Path, tmp_path: Path, in_the_repository: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "videos"
    assert sample.main([str(finished), "--prompt", "a red ball", "--out", str(out)]) == 0
    assert len(list(out.glob("*.mp4"))) == 1


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_an_adapter_goes_where_the_family_says(tmp_path: Path, in_the_repository: None) -> None:
    run, lora = tmp_path / "run", ("model.lora.rank=2", "reference.storage=adapter", "model.device=cpu")
    assert entry.main(command(run, "steps=2", *lora)) == 0
    saved = load_file(policy(run, 2).with_name("adapter_model.safetensors"))
    assert sorted(saved) == [
        f"base_model.model.blocks.{block}.shift.lora_{side}.weight" for block in (0, 1) for side in "AB"
    ]


def test_what_it_does_not_support_is_refused(
    tmp_path: Path, in_the_repository: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(command(tmp_path / "run", "memory.activation_checkpointing=block")) == 1
    assert "is not supported by model.kind=examples.own_model:ToyModel (toy); set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_preset_that_needs_a_plan_is_refused(
    tmp_path: Path, in_the_repository: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its class has no blueprint, and nothing is chosen without saying so."""
    assert entry.main(command(tmp_path / "run", "memory.preset=balanced", "model.device=cpu")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "its class has no blueprint (see docs/models.md); set memory.preset=lean, or fast" in said
    assert not (tmp_path / "run").exists()


def test_the_page_names_everything_that_is_left_to_define() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert all(f"`{name}" in page or f"{name}(" in page for name in BaseModel.__abstractmethods__)
