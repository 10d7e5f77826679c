"""Measures of a policy's clips, and a table of real runs from one end to the other."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from fake_cells import TINY

from vpo_engine.config_file import dump_config, load_config
from vpo_engine.reproducing.cells import RUN, Cell, Record
from vpo_engine.reproducing.making import Asked, grid_of, make
from vpo_engine.reproducing.measuring import frechet, frechet_by_clip, measured_config
from vpo_engine.reproducing.reading import read_run
from vpo_engine.reproducing.runner import CELLS
from vpo_engine.runs.directory import RunDirectory


def test_the_frechet_distance_is_the_closed_form_of_gaussians() -> None:
    random = torch.Generator().manual_seed(0)
    first = torch.randn(4000, 3, generator=random, dtype=torch.float64)
    second = 2 * torch.randn(4000, 3, generator=random, dtype=torch.float64) + torch.tensor([3.0, 0.0, 0.0])
    # |mean difference|^2 + sum of (1 - 2)^2 over three axes
    assert frechet(first, second) == pytest.approx(9 + 3, rel=0.06)
    assert frechet(first, first) == pytest.approx(0, abs=1e-6)
    rotated = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))[0]
    assert frechet(first @ rotated, second @ rotated) == pytest.approx(frechet(first, second), rel=1e-6)


def test_its_values_by_clip_have_its_mean_and_its_spread() -> None:
    """The standard error by clips of one set is near the spread of the distance over many sets."""
    random = torch.Generator().manual_seed(1)
    real = torch.randn(5000, 3, generator=random, dtype=torch.float64)
    sets = [0.5 + torch.randn(60, 3, generator=random, dtype=torch.float64) for _ in range(60)]
    distances = torch.tensor([frechet(clips, real) for clips in sets], dtype=torch.float64)
    errors = []
    for clips, distance in zip(sets[:10], distances, strict=False):
        values = frechet_by_clip(clips, real)
        assert values.shape == (60,)
        assert float(values.mean()) == pytest.approx(float(distance))
        errors.append(float(values.std()) / 60**0.5)
    assert sum(errors) / 10 == pytest.approx(float(distances.std()), rel=0.35)


@pytest.mark.long
def test_a_tiny_table_of_real_runs(tmp_path: Path) -> None:
    """Two steps of tiny runs: measured on the run's own clips, written, kept, and the same when asked for again."""
    asked = Asked(["table4d"], tmp_path, 2, seeds=1, settings=TINY)
    said: list[str] = []
    assert make(asked, said.append) == 0
    text = (tmp_path / "table4d.md").read_text()
    assert "Partial" not in text
    for (label, seed), cell in grid_of(asked)["table4d"].items():
        folder = tmp_path / CELLS / cell.name
        ran = read_run(folder)
        assert ran.training_seconds > 0
        assert (ran.videos, seed) == (2 * 2 * 2, 0)
        summary = json.loads(RunDirectory.open(folder / RUN).summary.read_text())["measures"]
        for name in ("judge/visual_quality", "pixels/flicker", "reward/temporal_consistency"):
            mean = sum(ran.clips[name]) / len(ran.clips[name])
            assert mean == pytest.approx(summary[name]["after"], rel=1e-4), (label, name)
    base = next((tmp_path / CELLS).glob("base-*"))
    clips = json.loads((base / "result.json").read_text())["clips"]
    assert len(clips["judge/mean"]) == 4
    assert sum(clips["pixels/flicker"]) / 4 == pytest.approx(summary["pixels/flicker"]["before"], rel=1e-4)
    record = Record.read(folder)
    assert record is not None
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / CELLS).glob("*/result.json")}
    assert make(asked, said.append) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / CELLS).glob("*/result.json")} == before
    with (tmp_path / "table4d.csv").open(newline="") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {"base policy", "offline DPO", "OnlineVPO"}


def test_a_policy_is_measured_with_the_seed_and_the_steps_of_its_own_evaluations(tmp_path: Path) -> None:
    settings = ["seed=3", "evaluation.steps=7", "evaluation.samples_per_prompt=5"]
    trained = dump_config(load_config("sprites_fast.yaml", settings))
    found = measured_config(trained, tmp_path / "policy", tmp_path / "run")
    assert (found.seed, found.held_out_steps, found.evaluation.samples_per_prompt) == (3, 7, 5)
    assert found.model.policy == tmp_path / "policy"
    assert measured_config(trained, None, tmp_path / "run").model.policy is None


REFL = ("method=refl", "refl.steps=12", "refl.last_steps=3", "refl.margin=null")


@pytest.mark.parametrize(("settings", "videos"), [((), 2 * 16 * 4), (REFL, 2 * 16)])
def test_a_run_costs_what_its_steps_took_and_the_videos_that_were_scored(
    tmp_path: Path, settings: tuple[str, ...], videos: int
) -> None:
    """Of 50 seconds by the clock 20 were spent in steps, and so were two fifths of 100 seconds of processors."""
    cell = Cell("run", settings, 0)
    record = Record.of(cell)
    record.add("train", 100.0, 50.0)
    record.finished = True
    record.write(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"clips": {"judge/mean": [1.0]}}))
    run = RunDirectory.create_at(tmp_path / RUN, cell.resolved())
    run.metrics.write_text("".join(json.dumps({"step": step, "kind": "train"}) + "\n" for step in (1, 2)))
    timings = {"rollout": 12.0, "update": 8.0, "text": 1.0, "evaluate": 15.0, "checkpoint": 4.0, "step": 40.0}
    run.summary.write_text(json.dumps({"clips": 1, "measures": {}, "timings": timings}))
    ran = read_run(tmp_path)
    assert (ran.training_seconds, ran.videos) == (pytest.approx(40.0), videos)
