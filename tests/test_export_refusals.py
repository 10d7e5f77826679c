"""Exports that are refused, that break off, and that would not be the policy."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from before_torch import call_each
from export_case import Case, exported, fails, make_case
from safetensors.torch import load_file, save_file
from torch import nn

from vpo_engine import export
from vpo_engine.exporting import folder, write
from vpo_engine.exporting.folder import refuse_occupied, written_at
from vpo_engine.models.diffusers_model import DiffusersModel
from vpo_engine.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("wan", tmp_path_factory.mktemp("one"))


class TestMismatch:
    """An export that is not the policy is never called done."""

    def test_a_weight_that_was_written_wrongly(
        self, wan: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = DiffusersModel.save_full_policy

        def spoil(model: DiffusersModel, folder: Path) -> None:
            whole(model, folder)
            file = folder / "diffusion_pytorch_model.safetensors"
            tensors = load_file(file)
            tensors["proj_out.weight"][0, 0] += 1e-3
            save_file(tensors, file, metadata={"format": "pt"})

        monkeypatch.setattr(DiffusersModel, "save_full_policy", spoil)
        out = tmp_path / "out"
        error = fails(capsys, wan.full, "--out", out)
        assert "does not hold the weights of the policy: proj_out.weight differs by up to 0.001" in error
        assert not out.exists()
        kept = tmp_path / "out.unfinished"
        assert str(kept) in error
        assert (kept / "transformer" / "config.json").is_file()
        monkeypatch.undo()
        assert f"{kept} is what an earlier export left behind; delete it" in fails(
            capsys, wan.full, "--out", out
        )

    @pytest.mark.parametrize("factor", [1.5, 0.0])
    def test_a_scale_that_is_wrong(
        self,
        wan: Case,
        tmp_path: Path,
        factor: float,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        whole = write.save_diffusers

        def spoil(adapter: Any, folder: Path, dtype: torch.dtype) -> None:
            layers = {name: (down, factor * up) for name, (down, up) in adapter.layers.items()}
            whole(type(adapter)(layers), folder, dtype)

        monkeypatch.setattr(write, "save_diffusers", spoil)
        error = fails(capsys, wan.lora, "--out", tmp_path / "out")
        assert (
            "the export does not hold the weights of the policy: blocks.0.attn1.to_k.lora_B differs by"
            in error
        )

    def test_a_merge_that_is_wrong(
        self, wan: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = write.merge_adapter

        def spoil(network: Any) -> None:
            network.blocks[1].attn1.to_v.scaling["default"] *= 2
            whole(network)

        monkeypatch.setattr(write, "merge_adapter", spoil)
        error = fails(capsys, wan.lora, "--merge", "--out", tmp_path / "out")
        assert "on the same inputs its prediction differs by" in error

    def test_an_export_that_breaks_off_leaves_nothing(
        self, wan: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(*given: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(write, "add_parts", stop)
        assert export.main([str(wan.full), "--out", str(tmp_path / "out")]) == 130
        assert "nothing was exported" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestRefusals:
    ARGUMENTS = (
        (["FULL", "--out", "OCCUPIED"], "is not empty; give another folder, or delete this one"),
        (["FULL", "--out", "FILE"], "is a file; give a folder"),
        (["FULL", "--out", "FILE/out"], "is a file; give another folder"),
        (["FULLY", "--out", "out"], "there is no run or checkpoint at FULLY"),
        (["FULL", "--out", "out", "--step", "3"], "no complete checkpoint step_00000003; give one of its steps"),
        (["STEP", "--out", "out", "--step", "3"], "--step 3 chooses among the checkpoints of a run"),
        (["FULL", "--out", "out", "--merge"], "--merge merges an adapter, but"),
        (["FULL", "--out", "out", "--format", "peft"], "--format peft is the dialect of an adapter, but the"),
        (["LORA", "--out", "out", "--format", "peft", "--merge"], "but a merged export is a whole model"),
        (["LORA", "--out", "out", "--base", "FULL"], "has no model_index.json; give the folder of a whole"),
        (["ALTERED", "--out", "out"], "was altered after it was saved"),
    )  # fmt: skip

    def test_what_the_arguments_tell_needs_no_torch(self, wan: Case, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "a.txt").touch()
        (tmp_path / "file").touch()
        altered = Path(shutil.copytree(wan.full, tmp_path / "altered"))
        settings = altered / "checkpoints/step_00000004/policy/config.json"
        settings.write_text(settings.read_text().replace('"num_layers": 2', '"num_layers": 1'))
        places = {
            "FULL": wan.full,
            "LORA": wan.lora,
            "STEP": wan.full / "checkpoints" / "step_00000002",
            "OCCUPIED": tmp_path / "full",
            "FILE": tmp_path / "file",
            "FILE/out": tmp_path / "file" / "out",
            "ALTERED": altered,
        }
        calls = [[str(places.get(word, word)) for word in arguments] for arguments, _ in self.ARGUMENTS]
        said = call_each("vpo_engine.export", calls, tmp_path)
        for (arguments, words), found in zip(self.ARGUMENTS, said, strict=True):
            assert (found.code, found.heavy) == (1, []), arguments
            assert words in found.errors, arguments
            assert "Traceback" not in found.errors, arguments
        assert not (tmp_path / "out").exists()

    def test_a_full_disk(
        self, wan: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        real = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=2**20))
        error = fails(capsys, wan.full, "--out", tmp_path / "out")
        assert f"the disk of {tmp_path} has 0.00 GiB free, but this export needs 0.02 GiB" in error
        assert list(tmp_path.iterdir()) == []

    def test_values_that_a_type_cannot_hold(
        self, wan: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = RunDirectory(Path(shutil.copytree(wan.full, tmp_path / "run")))
        folder = run.checkpoints / "step_00000004"
        file = folder / "policy" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["blocks.0.attn1.to_q.weight"][0, 0] = 1e6
        save_file(tensors, file, metadata={"format": "pt"})
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = manifest["files"]["policy/diffusion_pytorch_model.safetensors"]
        entry.update(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        error = fails(capsys, run.root, "--dtype", "float16", "--out", tmp_path / "out")
        assert (
            "--dtype float16 cannot hold blocks.0.attn1.to_q.weight; give --dtype bfloat16 or float32"
            in error
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [".", "link"])
def test_an_empty_folder_is_filled_by_whatever_name_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not finished lies on the same disk as the folder."""
    place = tmp_path / "disk" / "folder"
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place if name == "." else tmp_path)
    refuse_occupied(Path(name))
    with written_at(Path(name)) as unfinished:
        assert unfinished.parent == place.parent
        (unfinished / "a").write_text("b")
    assert (place / "a").read_text() == "b"
    assert [path.name for path in place.parent.iterdir()] == ["folder"]
    assert Path(name).samefile(place)


@pytest.mark.parametrize("moved", [False, True])
def test_the_parts_beside_the_policy_are_those_of_the_base_that_is_named(
    wan: Case, tmp_path: Path, moved: bool
) -> None:
    """Also where the folder that the run started from is there no more."""
    run = Path(shutil.copytree(wan.full, tmp_path / "run"))
    base = Path(shutil.copytree(wan.published, tmp_path / "base"))
    if moved:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(str(wan.published), str(tmp_path / "gone")))
    out = exported(run, tmp_path / "out", "--base", str(base))
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (base / part).iterdir():
            assert (out / part / file.name).samefile(file)


@pytest.mark.parametrize(("elsewhere", "copied"), [(False, 0), (True, 5)])
def test_the_room_is_that_of_what_is_written_and_of_parts_on_another_disk(
    elsewhere: bool, copied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part").write_bytes(bytes(5))
    real = shutil.disk_usage(tmp_path)
    needed = 1000 + copied + folder._SPARE
    if elsewhere:
        monkeypatch.setattr(folder, "os", SimpleNamespace(stat=lambda file: SimpleNamespace(st_dev=-1)))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=needed))
    folder.check_space(tmp_path / "out", 1000, {"part": tmp_path / "part"})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=needed - 1))
    with pytest.raises(ValueError, match="give an --out on another disk"):
        folder.check_space(tmp_path / "out", 1000, {"part": tmp_path / "part"})
    assert write._bytes(nn.Linear(3, 4), torch.bfloat16) == 2 * 16


def test_an_adapter_is_exported_by_the_base_that_is_named_where_its_own_is_gone(
    wan: Case, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(wan.lora, tmp_path / "run"))
    base = Path(shutil.copytree(wan.published, tmp_path / "base"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(wan.published), str(tmp_path / "gone")))
    assert (exported(run, tmp_path / "out", "--base", str(base)) / write.DIFFUSERS_FILE).is_file()
