"""The work of a run at its start and at a resume does not grow with its steps, and logs in parts resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import engine
import pytest
import torch

from vpo_engine import line_files
from vpo_engine.data.prompts import PromptItem, PromptStream
from vpo_engine.line_files import parts
from vpo_engine.runs.disk_use import DiskWatch
from vpo_engine.runs.log import read_metrics

SETTINGS = ("steps=6", "evaluation.every=2")


def rows(run: Path) -> list[dict[str, float | str]]:
    clocks = ("seconds/", "speed/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(clocks)}
        for row in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_with_logs_in_parts_resumes_bit_for_bit(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.train(engine.make_config(tmp_path / "whole", *SETTINGS))
    monkeypatch.setattr(line_files, "PART_BYTES", 1500)
    whole, run = tmp_path / "whole/run", tmp_path / "cut/run"
    engine.train(engine.make_config(tmp_path / "cut", *SETTINGS))
    assert len(parts(run / "metrics.jsonl")) > 3
    assert len(parts(run / "preference_dataset/pairs_0000.jsonl")) > 3
    engine.forget_after(run, step)
    (run / "summary.json").unlink()
    engine.train(engine.make_config(tmp_path / "cut", *SETTINGS))
    assert rows(run) == rows(whole)
    lines = [[vars(line) | {"latents_file": None} for line in engine.lines_of(each)] for each in (run, whole)]
    assert lines[0] == lines[1]
    expected = engine.saved_tensors(whole, 6)
    assert all(torch.equal(value, expected[name]) for name, value in engine.saved_tensors(run, 6).items())
    logged = sum(float(row["seconds/step"]) for row in read_metrics(run / "metrics.jsonl") if "pairs" in row)
    timings = json.loads((run / "summary.json").read_text())["timings"]
    assert -1e-6 < timings["step"] - logged < 60  # the evaluation at the end is in no row


def test_prompts_are_encoded_once_however_many_steps_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, take = [], PromptStream.take

    def watched(stream: PromptStream, cursor: int, count: int) -> list[PromptItem]:
        asked.append(count)
        return take(stream, cursor, count)

    monkeypatch.setattr(PromptStream, "take", watched)
    monkeypatch.setattr(DiskWatch, "exhausted", lambda watch, step: "enough")
    engine.train(engine.make_config(tmp_path, "steps=100000", "pairs.dataset=none"), exit_code=1)
    assert max(asked) == len(engine.PROMPTS)
