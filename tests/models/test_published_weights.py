"""Strict loading: what fits loads exactly, what does not says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpo_engine.data.sprites.assets import load_policy
from vpo_engine.models.opensora.checkpoint import (
    load_config,
    load_strict,
    read_weights,
    save_pretrained_layout,
    write_public_index,
)
from vpo_engine.models.opensora.load import load_stdit3
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
    with pytest.raises(ValueError, match=r"weights.ckpt: expected a file that ends in .safetensors, .bin"):
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


# --- the layouts of a training run ---------------------------------------------------------------------------------


def write_sharded(folder: Path, state: dict[str, Tensor], stem: str, index: str) -> None:
    """Write two shards and their index, named as ColossalAI (NAME-00001.bin) or transformers do."""
    folder.mkdir(parents=True)
    suffix, promised = Path(stem).suffix, {}
    for number, shard in enumerate(split(state), start=1):
        name = stem.format(number)
        promised |= dict.fromkeys(shard, name)
        if suffix == ".safetensors":
            save_file(shard, folder / name)
        else:
            torch.save(shard, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": promised}))


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("pytorch_model-{:05d}.bin", "pytorch_model.bin.index.json"),
        ("model-{:05d}.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.mine-{:05d}.bin", "pytorch_model.mine.bin.index.json"),
        ("model.fp16-{:05d}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
    ],
)
def test_the_top_folder_of_a_training_run_loads(tmp_path, state, capsys, stem, index):
    top = tmp_path / "epoch0-global_step100"
    write_sharded(top / "model", state, stem, index)
    (top / "model" / "config.json").write_text(json.dumps(STDiT3.from_config(CONFIG).config))
    (top / "optimizer").mkdir()
    (top / "running_states.json").write_text("{}")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, top / "ema.pt")
    assert_holds(load_stdit3(top), state)
    assert f"To take the averaged ones set model.policy={top / 'ema.pt'}" in capsys.readouterr().err
    assert_holds(load_stdit3(top / "model" / index), state)
    averaged = load_stdit3(top / "ema.pt").state_dict()
    assert all(torch.equal(averaged[name], tensor + 1) for name, tensor in state.items())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["stdit3.safetensors", "model_ckpt.pt", "weights.pth", "diffusion.bin"])
def test_one_file_of_any_name_loads(tmp_path, state, name):
    (tmp_path / "config.json").write_text(json.dumps(STDiT3.from_config(CONFIG).config))
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    assert_holds(load_stdit3(tmp_path), state)
    assert_holds(load_stdit3(tmp_path / name), state)


def test_a_folder_that_could_mean_several_things_is_refused(tmp_path, state):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"several weight files \(a.safetensors, b.safetensors\); give the path"
    ):
        read_weights(tmp_path)


def test_folders_without_trained_weights_say_what_was_meant(tmp_path, state):
    top = tmp_path / "outputs" / "epoch1-global_step200"
    top.mkdir(parents=True)
    torch.save(state, top / "ema.pt")
    with pytest.raises(FileNotFoundError, match=r"only averaged ones; to take those give .*step200/ema.pt"):
        read_weights(top)
    (top / "model").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"outputs holds no weights of its own; did you mean .*step200\?"
    ):
        read_weights(tmp_path / "outputs")
    policy = tmp_path / "run" / "checkpoints" / "step_00000048" / "policy"
    policy.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*step_00000048/policy\?"):
        read_weights(tmp_path / "run")
    save_file(state, policy / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds a LoRA adapter, not a whole model; merge it"):
        read_weights(policy)


def test_weights_without_a_config_are_taken_for_the_published_size_aloud(tmp_path, state, capsys):
    torch.save(state, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"expected \[1152\b.*; config.json is missing, put that of its"):
        load_stdit3(tmp_path / "ema.pt")
    assert "has no config.json; it is taken for STDiT3-XL/2" in capsys.readouterr().err


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path, state):
    torch.save({"ema": state, "step": 3}, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"not a plain dictionary of tensors: ema, step is something else"):
        read_weights(tmp_path / "ema.pt")


def test_the_public_loader_reads_a_saved_policy(folder, state):
    """The public loader reads FOLDER/model: the one index file there, whose shards lie relative to it."""
    write_public_index(folder)
    (index,) = (folder / "model").glob("*.index.*json")
    assert "safetensors" in index.name
    promised = json.loads(index.read_text())["weight_map"]
    loaded: dict[str, Tensor] = {}
    for name in set(promised.values()):
        file = index.absolute().parent.joinpath(name)
        assert file.suffix == ".safetensors"
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata()["format"] == "pt"
        loaded |= load_file(file)
    assert promised.keys() == loaded.keys()
    module = network()
    module.load_state_dict(loaded, strict=True)
    assert_holds(module, state)
    assert_holds(load_stdit3(folder), state)


def test_a_policy_whose_config_asks_for_more_than_it_has_is_refused_by_its_weights(folder):
    config = load_config(folder)
    sizes = {"hidden_size": 1 << 20, "depth": 1}  # the weights would take some 100 TB
    (folder / "config.json").write_text(json.dumps(config | sizes))
    with pytest.raises(ValueError, match=r"is not a checkpoint of STDiT3, .* weights disagree"):
        load_policy(folder)


def test_two_indices_of_pickles_are_refused_too(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "part.bin")
    for name in ("first", "second"):
        (tmp_path / f"{name}.bin.index.json").write_text(json.dumps({"weight_map": {"a": "part.bin"}}))
    with pytest.raises(ValueError, match=r"several indices of shards \(first\.bin\.index\.json, second\."):
        read_weights(tmp_path)


def test_a_policy_in_bfloat16_is_trained_in_float32(tmp_path, state):
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    save_pretrained_layout(rounded, STDiT3.from_config(CONFIG).config, tmp_path)
    held = load_stdit3(tmp_path).state_dict()
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in rounded.items())
