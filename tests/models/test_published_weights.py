"""Strict loading: what fits loads exactly, what does not says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpo_engine.models.opensora.checkpoint import (
    load_config,
    load_strict,
    read_weights,
    save_pretrained_layout,
)
from vpo_engine.models.opensora.stdit3 import STDiT3

DATA = Path(__file__).parents[1] / "data" / "opensora"
CONFIG = json.loads((DATA / "stdit3_tiny.json").read_text())["config"]


@pytest.fixture
def state() -> dict[str, Tensor]:
    return load_file(DATA / "stdit3_tiny_weights.safetensors")


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    save_pretrained_layout(state, STDiT3.from_config(CONFIG).config, tmp_path / "policy")
    return tmp_path / "policy"


def network(device: str = "cpu") -> STDiT3:
    with torch.device(device):
        return STDiT3.from_config(CONFIG)


def assert_holds(module: STDiT3, state: dict[str, Tensor]) -> None:
    held = module.state_dict()
    assert held.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(held[name], tensor.to(held[name].dtype)), name


def split(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(state)
    return [{name: state[name] for name in names[i::2]} for i in range(2)]


def test_saved_layout_is_the_published_one(folder, state):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(state)
    assert load_config(folder)["model_type"] == "STDiT3"
    again = STDiT3.from_config(load_config(folder / "model.safetensors"))
    load_strict(again, folder)
    assert_holds(again, state)


@pytest.mark.parametrize("path", ["", "model.safetensors"])
def test_folder_and_file_load(folder, state, path):
    module = network()
    load_strict(module, folder / path)
    assert_holds(module, state)


def test_meta_modules_become_the_file(folder, state):
    module = network("meta")
    load_strict(module, folder)
    assert_holds(module, state)
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    assert not module.rope["freqs"].requires_grad
    assert module.x_embedder.proj.weight.requires_grad


def test_frozen_parameters_stay_frozen(folder):
    with torch.device("meta"):
        module = STDiT3.from_config({**CONFIG, "freeze_y_embedder": True})
    load_strict(module, folder)
    assert not any(parameter.requires_grad for parameter in module.y_embedder.parameters())


def test_loading_keeps_the_modules_dtype(folder, state):
    module = network().to(torch.bfloat16)
    load_strict(module, folder)
    assert module.dtype == torch.bfloat16
    assert_holds(module, state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_folders_load(tmp_path, state, suffix):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    promised = {}
    for i, shard in enumerate(split(state), start=1):
        name = f"{stem}-0000{i}-of-00002.{suffix}"
        promised |= dict.fromkeys(shard, name)
        if suffix == "bin":
            torch.save(shard, tmp_path / name)
        else:
            save_file(shard, tmp_path / name)
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": promised}))
    module = network()
    load_strict(module, tmp_path)
    assert_holds(module, state)
    (tmp_path / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 are missing: {stem}-00002-of-00002"):
        load_strict(module, tmp_path)


def test_a_wrong_checkpoint_is_named_and_changes_nothing(tmp_path, state):
    other = {name: tensor for name, tensor in state.items() if not name.startswith("temporal_blocks.1.")}
    other["final_layer.linear.weight"] = torch.zeros(16, 64)
    other["pos_embed"] = torch.zeros(3)
    save_file(other, tmp_path / "model.safetensors")
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="is not a checkpoint of STDiT3, 19 weights disagree") as caught:
        load_strict(module, tmp_path)
    message = str(caught.value)
    assert "missing temporal_blocks.1.scale_shift_table, " in message
    assert " and 13 more; unexpected pos_embed; " in message
    assert "final_layer.linear.weight is [16, 64], expected [32, 64]" in message
    assert_holds(module, before)


@pytest.mark.parametrize("kept", [0, 4, 1000, 0.5, 0.999])
def test_a_truncated_file_is_called_damaged(folder, kept):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(
        ValueError, match=r"model.safetensors cannot be read \(\d+ bytes, damaged, incomplete.*again"
    ):
        load_strict(network(), folder)


def test_a_truncated_pickle_is_called_unreadable(tmp_path, state):
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read .*again"):
        read_weights(tmp_path)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_pickles_never_run_code(tmp_path, capsys):
    torch.save({"weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


def test_missing_things_say_what_belongs_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist; expected a folder with model.safetens"
    ):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"holds no weights: expected model.safetensors, .*found nothing"
    ):
        read_weights(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"found weights.ckpt"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match=r"weights.ckpt: expected a .safetensors or .bin file"):
        read_weights(tmp_path / "weights.ckpt")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; a model folder holds config.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds a list"):
        load_config(tmp_path)


def test_a_broken_index_is_called_so(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is not an index of shards"):
        read_weights(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}))
    with pytest.raises(ValueError, match=r"lack 1 of its keys: b"):
        read_weights(tmp_path)
