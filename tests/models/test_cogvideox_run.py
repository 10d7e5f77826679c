"""Whole runs of CogVideoX on a tiny folder: full fine-tuning and LoRA, interrupted and resumed, and planned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from power_cut import copy_cut
from safetensors.torch import load_file
from tiny_diffusers import cogvideox_pipeline, run_words

from vpo_engine import plan
from vpo_engine import train as entry
from vpo_engine.config_file import load_config
from vpo_engine.planning.fit import with_setting
from vpo_engine.planning.parts import configurations_are_here
from vpo_engine.planning.presets import resolve_presets
from vpo_engine.runs.log import read_metrics

MODES = {
    "full": ("memory.activation_checkpointing=block", "memory.mlp_chunks=2"),
    "bf16": (
        "memory.weights=fp32_master",
        "reference.storage=exact8",
        "rollout.candidates=3",
        "rollout.prune={after: 0.5, keep: 2}",
    ),
    "lora": ("model.lora.rank=2", "reference.storage=adapter", "memory.sequential=true"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    cogvideox_pipeline().save_pretrained(folder)
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss", "margin", "grad_norm", "reward/selected", "reference_age")
    found = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    return [{name: row[name] for name in kept} for row in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints" / "step_00000003" / "policy").glob("*.safetensors")
    return load_file(file)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_a_run_trains_and_resumes_bit_for_bit(folder: Path, tmp_path: Path, mode: str) -> None:
    options = MODES[mode]
    assert entry.main(run_words(folder, tmp_path / "whole", *options)) == 0
    found = rows(tmp_path / "whole")
    assert [row["margin"] == 0.0 for row in found] == [True, False, True]
    assert found[2]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    after = weights(tmp_path / "whole")
    if mode == "lora":
        assert all(tensor.any() for tensor in after.values())
    else:
        before = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        assert before.keys() == after.keys()
        moved = "transformer_blocks.0.attn1.to_q.weight"
        assert not torch.equal(before[moved], after[moved])

    copy_cut(tmp_path / "whole", tmp_path / "cut", 2)
    assert entry.main(run_words(folder, tmp_path / "cut", *options, "checkpoint.resume=true")) == 0
    assert rows(tmp_path / "cut") == found
    again = weights(tmp_path / "cut")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_a_run_on_a_folder_is_planned_by_its_own_config_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = run_words(folder, tmp_path / "run")
    assert configurations_are_here(load_config(None, words))
    assert plan.main([*words, "--gpu", "a100-80g"]) == 0
    shown = capsys.readouterr().out
    assert "fits in" in shown
    assert "no config.json here" not in shown
    away = [word for word in words if not word.startswith("model.policy")]
    assert not configurations_are_here(load_config(None, [*away, "model.policy=absent"]))


def test_settings_that_the_family_does_not_have_are_neither_proposed_nor_preset(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, run_words(folder, tmp_path / "run", "memory.preset=balanced"))
    assert with_setting(config, "memory.decode_frames", 1) is None
    assert with_setting(config, "memory.mlp_chunks", 4) is not None
    resolved, _ = resolve_presets(config, lambda _: False)
    assert resolved.memory.decode_frames is None
    assert (resolved.memory.weights, resolved.memory.mlp_chunks) == ("fp32_master", 4)
    assert entry.main(run_words(folder, tmp_path / "run", "memory.preset=lean")) == 1
    assert "memory.decode_frames=2 is not supported by model.kind=cogvideox (CogVideoX-2B); set " in (
        capsys.readouterr().err
    )


def test_a_run_of_a_size_that_no_latent_has_stops_at_the_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(run_words(folder, tmp_path / "run", "model.num_frames=34")) == 1
    assert "error: model.num_frames=34 must be 8k + 1 or 8k + 8 for this model; set it to 33 or 40" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
