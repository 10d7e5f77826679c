"""Test the study of the fast mode: its differences, its times, and that a failed run is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_mode import EXACT, FAST, Run, Took, _shares, interval, main

from vpo_engine.config_file import load_config


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def test_the_fast_mode_differs_where_its_file_says_so() -> None:
    exact, fast = (flat(load_config(name).model_dump()) for name in (EXACT, FAST))
    told = (Path(__file__).parents[2] / "configs" / FAST).read_text(encoding="utf-8").splitlines()[1]
    names = told.removeprefix("# Not as in sprites.yaml: ").removesuffix(".").split(", ")
    assert [name for name in exact if exact[name] != fast[name]] == names


def test_seconds_are_added_up_before_they_are_compared(tmp_path: Path) -> None:
    times = [(Took(100, 200, 50), Took(30, 80, 10)), (Took(300, 400, 150), Took(170, 220, 70))]
    assert _shares(times) == ["400, 200", "0.50", "600, 300", "0.50", "200, 80", "0.40"]
    run = Run(tmp_path, FAST, 2)
    assert run.root == tmp_path / "sprites_fast-2"
    run.record.write_text(json.dumps({"cpu": 1.0, "clock": 2.0, "stages": 0.5}), encoding="utf-8")
    assert run.took() == Took(1.0, 2.0, 0.5)


def test_the_interval_is_of_paired_differences() -> None:
    differences = (torch.arange(400) % 2).double() - 0.25
    mean, low, high = interval(differences)
    assert mean == 0.25
    assert (low, high) == (
        pytest.approx(0.25 - 1.96 * 0.025, abs=0.01),
        pytest.approx(0.25 + 1.96 * 0.025, abs=0.01),
    )


def test_a_run_that_fails_names_its_log_and_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@, threads $OMP_NUM_THREADS"\nexit 3\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    cpu = min(os.sched_getaffinity(0))
    assert main(["--runs", str(tmp_path), "--seeds", "7", "--cpus", str(cpu)]) == 1
    log = tmp_path / "sprites-7.log"
    assert f"failed; see {log}" in capsys.readouterr().err
    command = (
        f"-m vpo_engine.train sprites.yaml seed=7 run_dir={tmp_path / 'sprites-7'} checkpoint.every=null"
    )
    assert log.read_text(encoding="utf-8") == f"{command}, threads 1\n"
    assert not (tmp_path / "sprites-7.json").exists()
