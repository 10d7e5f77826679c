"""Publishing a policy: the folder, the card, and what is asked of the Hub. A stand-in takes the place of HfApi."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

from vpo_engine import push
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.exporting.options import ExportOptions
from vpo_engine.metrics.summary import summarise
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.directory import RunDirectory

SECRET = "a secret prompt about a fox"


def finished(root: Path, overrides: list[str], adapter: bool = False) -> RunDirectory:
    """Make a run of three steps with a checkpoint, rows and a summary."""
    run = RunDirectory.create_at(
        root, dump_config(load_config(None, ["steps=3", "pairs_per_step=4", *overrides]))
    )

    def write_policy(folder: Path) -> None:
        if adapter:
            save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
            fields = {"base_model_name_or_path": "/home/ann/ckpt/OpenSora-STDiT-v3", "r": 8}
            (folder / "adapter_config.json").write_text(json.dumps(fields))
            return
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors.index.json").write_text("{}")

    save_checkpoint(run.checkpoints, 3, tensors={}, state={}, write_policy=write_policy, keep=1)
    rows = [{"step": step, "kind": "train", "pairs": 3} for step in (1, 2, 3)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = torch.linspace(0, 1, 8)
    summary = summarise(
        {"reward/selected": before}, {"reward/selected": before + torch.linspace(0.4, 0.6, 8)}, {}
    )
    run.summary.write_text(json.dumps(summary))
    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for HfApi that keeps what it was asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def create(repo: str, **given: Any) -> str:
        asked.append(("create", {"repo": repo, **given}))
        return f"https://huggingface.co/{repo}"

    def upload(**given: Any) -> None:
        files = {str(file.relative_to(given["folder_path"])) for file in given["folder_path"].rglob("*")}
        asked.append(("upload", given | {"files": files}))

    api = SimpleNamespace(
        asked=asked,
        whoami=lambda: {"name": "ann"},
        create_repo=create,
        upload_folder=upload,
        repo_info=lambda repo: SimpleNamespace(private=True),
    )
    importlib.import_module("transformers.utils.hub")  # it derives types from the class of the library
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return api


def test_a_policy_is_uploaded_with_its_card(tmp_path, hub, capsys):
    run = finished(tmp_path / "run", [])
    assert push.main([str(run.root), "ann/sprites-dpo", "--private"]) == 0
    assert capsys.readouterr().out == "published at https://huggingface.co/ann/sprites-dpo\n"
    (_, created), (_, uploaded) = hub.asked
    assert created == {"repo": "ann/sprites-dpo", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "ann/sprites-dpo"
    assert uploaded["files"] == {
        "README.md", "model.safetensors", "config.json", "model", "model/model.safetensors.index.json"
    }  # fmt: skip


def test_a_dry_run_sends_nothing_and_prints_a_true_card(tmp_path, hub, capsys):
    run = finished(
        tmp_path / "run", ["rollout.candidates=4", "optimizer.lr=3e-5", "reference.refresh_every=null"]
    )
    for _ in range(2):
        assert push.main([str(run.root), "ann/sprites-dpo", "--dry-run"]) == 0
    assert hub.asked == []
    text = (run.root / "hub" / "README.md").read_text()
    assert text in capsys.readouterr().out
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-to-video"
    assert yaml.safe_load(head)["license"] == "other"
    assert "12 prompts were drawn in 3 steps, and 48 videos sampled" in body
    assert "9 pairs of best and worst were learned from" in body
    assert "| learning rate | 3e-05 |" in body
    assert "between refreshes of the reference) | none |" in body
    assert "| reward/selected | 0.500 | 1.000 | +0.500 | [+0.441, +0.559] | better |" in body
    assert "hf download ann/sprites-dpo --local-dir policy" in body
    assert "arxiv.org/abs/2412.15159" in body
    saved = load_file(run.checkpoints / "step_00000003" / "policy" / "model.safetensors")
    assert torch.equal(load_file(run.root / "hub" / "model.safetensors")["a"], saved["a"])


def test_neither_prompts_nor_local_paths_are_published(tmp_path, hub):
    prompts = tmp_path / "ann" / "prompts.txt"
    prompts.parent.mkdir()
    prompts.write_text(SECRET + "\n")
    policy = tmp_path / "ann" / "OpenSora-STDiT-v3"
    keys = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", f"model.policy={policy}"]
    lora = ["model.lora.rank=8", "reference.storage=adapter", "model.kind=opensora", "reward.kind=builtin"]
    run = finished(tmp_path / "run", [*keys, *lora], adapter=True)
    checkpoint = run.checkpoints / "step_00000003" / "policy" / "adapter_config.json"
    before = checkpoint.read_text()
    assert push.main([str(run.root), "ann/lora", "--dry-run"]) == 0
    for file in (run.root / "hub").rglob("*.*"):
        content = file.read_bytes()
        assert SECRET.encode() not in content
        assert str(tmp_path).encode() not in content
        assert b"/home/ann" not in content
    fields = json.loads((run.root / "hub" / "adapter_config.json").read_text())
    assert fields == {"base_model_name_or_path": "OpenSora-STDiT-v3", "r": 8}
    assert checkpoint.read_text() == before
    text = (run.root / "hub" / "README.md").read_text()
    assert "OpenSora-STDiT-v3 (family opensora)" in text
    assert "| LoRA | rank 8, scale 2 |" in text


def test_what_the_hub_refuses_is_one_line(tmp_path, hub, capsys):
    run = finished(tmp_path / "run", [])
    hub.repo_info = lambda repo: SimpleNamespace(private=False)
    assert push.main([str(run.root), "ann/open", "--private"]) == 1
    assert "ann/open exists already and is public, although --private is given" in capsys.readouterr().err
    assert [name for name, _ in hub.asked] == ["create"]

    def fail(error: Exception) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            raise error

        return call

    hub.upload_folder = fail(HTTPError("no route to host\nmore"))
    assert push.main([str(run.root), "ann/open"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "error: the Hub refuses ann/open or cannot be reached (no route to host); the folder is kept in "
        f"{run.root / 'hub'}\n"
    )
    hub.whoami = fail(LocalTokenNotFoundError("no token"))
    assert push.main([str(run.root), "ann/open"]) == 1
    assert "you are not logged in to the Hub; run hf auth login, or set HF_TOKEN" in capsys.readouterr().err


def test_only_a_finished_run_and_a_whole_name_are_taken(tmp_path, hub, capsys):
    run = finished(tmp_path / "run", [])
    for name in ("sprites", "a/b/c", "ann/with space"):
        assert push.main([str(run.root), name, "--dry-run"]) == 1
        assert "cannot be the name of a repository" in capsys.readouterr().err
    run.summary.unlink()
    assert push.main([str(run.root), "ann/x"]) == 1
    assert "has not finished, so there is no result to publish; resume it first" in capsys.readouterr().err
    assert hub.asked == []


def test_a_base_is_refused_for_a_model_without_a_pipeline(tmp_path, hub, capsys):
    run = finished(tmp_path / "run", [])
    assert push.main([str(run.root), "ann/x", "--dry-run", "--base", str(tmp_path)]) == 1
    assert f"--base {tmp_path} is for models with a diffusers pipeline" in capsys.readouterr().err


def test_what_was_changed_since_it_was_saved_is_not_published(tmp_path, hub, capsys):
    run = finished(tmp_path / "run", [])
    file = run.checkpoints / "step_00000003/policy/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert push.main([str(run.root), "ann/x"]) == 1
    error = capsys.readouterr().err
    assert f"'{file}' was altered after it was saved: its SHA-256 is" in error
    file.write_bytes(content)
    (file.parent / "notes.txt").write_text("a secret")
    assert push.main([str(run.root), "ann/x"]) == 1
    assert "notes.txt' was added after the checkpoint was saved" in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize("average", [False, True])
def test_the_weights_that_the_run_evaluated_are_exported_with_the_base(tmp_path, hub, monkeypatch, average):
    run, base, asked = finished(tmp_path / "run", []), tmp_path / "base", []
    pipelines = SimpleNamespace(card=SimpleNamespace(pipelines=("WanPipeline",)))

    def export(checkpoint: Path, out: Path, options: ExportOptions) -> None:
        out.mkdir()
        asked.append((checkpoint, options))

    monkeypatch.setattr(push, "export", export)
    monkeypatch.setattr(push, "model_family", lambda kind: pipelines)
    monkeypatch.setattr(push, "evaluated_policy", lambda newest: newest / ("ema" if average else "policy"))
    assert push.main([str(run.root), "ann/x", "--dry-run", "--base", str(base)]) == 0
    assert asked == [(run.checkpoints / "step_00000003", ExportOptions(ema=average, base=base))]


def test_no_file_says_from_which_local_folder_it_was_loaded(tmp_path, hub, monkeypatch):
    """diffusers keeps it in the settings that it saves; the base itself stays as it is."""
    run, own = finished(tmp_path / "run", []), tmp_path / "own.json"
    own.write_text(json.dumps({"_class_name": "AutoencoderKLWan", "_name_or_path": "/home/ann/wan/vae"}))
    pipelines = SimpleNamespace(card=SimpleNamespace(pipelines=("WanPipeline",), resolutions=()))

    def export(checkpoint: Path, out: Path, options: ExportOptions) -> None:
        (out / "vae").mkdir(parents=True)
        os.link(own, out / "vae" / "config.json")
        (out / "model_index.json").write_text(json.dumps({"_name_or_path": "Wan-AI/Wan2.1"}))

    monkeypatch.setattr(push, "export", export)
    monkeypatch.setattr(push, "model_family", lambda kind: pipelines)
    assert push.main([str(run.root), "ann/x", "--dry-run"]) == 0
    published = json.loads((run.root / "hub" / "vae" / "config.json").read_text())
    assert published == {"_class_name": "AutoencoderKLWan", "_name_or_path": "vae"}
    assert json.loads((run.root / "hub/model_index.json").read_text()) == {"_name_or_path": "Wan-AI/Wan2.1"}
    assert "/home/ann/wan/vae" in own.read_text()


def test_the_card_tells_the_size_that_the_videos_have(tmp_path, hub, monkeypatch):
    """Families of diffusers have a height and a width; the names of sizes are Open-Sora's."""
    given = [
        "model.kind=wan",
        f"model.policy={tmp_path / 'Wan'}",
        "reward.kind=builtin",
        "model.num_frames=5",
    ]
    given += ["model.height=32", "model.width=48"]
    given += [f"prompts.{name}={tmp_path / 'none.txt'}" for name in ("train", "held_out")]
    run = finished(tmp_path / "run", given)
    monkeypatch.setattr(push, "export", lambda checkpoint, out, options: out.mkdir())
    assert push.main([str(run.root), "ann/x", "--dry-run"]) == 0
    text = (run.root / "hub" / "README.md").read_text()
    assert "240p" not in text
    assert "| aspect |" not in text
    for row in ("| height | 32 |", "| width | 48 |", "| frames | 5 |"):
        assert row in text


def test_the_card_of_a_method_without_pairs_tells_nothing_of_pairs(tmp_path, hub):
    run = finished(tmp_path / "run", ["method=refl"])
    assert push.main([str(run.root), "ann/x", "--dry-run"]) == 0
    _, head, body = (run.root / "hub" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["text-to-video", "reward-gradient"]
    assert "12 prompts were drawn in 3 steps, with a video each" in body
    assert "| method | ReFL |" in body
    for unused in ("candidates per prompt", "| beta |", "between refreshes of the reference"):
        assert unused not in body


def test_the_card_says_where_the_size_is_the_models_own(tmp_path, hub, monkeypatch):
    given = ["model.kind=cogvideox", f"model.policy={tmp_path / 'Cog'}", "reward.kind=builtin"]
    given += [f"prompts.{name}={tmp_path / 'none.txt'}" for name in ("train", "held_out")]
    run = finished(tmp_path / "run", given)
    monkeypatch.setattr(push, "export", lambda checkpoint, out, options: out.mkdir())
    assert push.main([str(run.root), "ann/x", "--dry-run"]) == 0
    text = (run.root / "hub" / "README.md").read_text()
    assert "| height | the model's own |" in text
    assert "| height | none |" not in text
