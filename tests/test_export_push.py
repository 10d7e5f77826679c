"""Publishing a run of a model with a diffusers pipeline: the folder is what the export makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_case import make_case

from vpo_engine import push
from vpo_engine.metrics.summary import summarise
from vpo_engine.runs.directory import RunDirectory


def test_what_is_published_is_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case("wan", tmp_path)
    before = {"reward/selected": torch.linspace(0, 1, 8)}
    for root in (case.full, case.lora):
        run = RunDirectory(root)
        run.summary.write_text(json.dumps(summarise(before, before, {})))
        run.metrics.write_text("")
        assert push.main([str(root), "ann/tuned", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    full, lora = case.full / "hub", case.lora / "hub"
    assert (full / "model_index.json").is_file()
    assert (full / "vae" / "config.json").is_file()
    assert (lora / "pytorch_lora_weights.safetensors").is_file()
    assert not (lora / "vae").exists()
    assert 'pipeline = DiffusionPipeline.from_pretrained("policy")  # WanPipeline' in shown
    assert 'pipeline.load_lora_weights("policy")' in shown
    for folder in (full, lora):
        for name in ("README.md", "vpo_export.json"):
            assert str(tmp_path) not in (folder / name).read_text()
