"""Loading of weights: files are mapped, and the memory is that of the network and one tensor."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpo_engine.weights import load_strict, move_in_order, read_file, read_files, weight_files

WORDS = {"where": "here", "model": "Tiny", "remedy": "fetch it"}


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, as long as they are held."""

    def __init__(self, besides: dict[str, Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in besides.values()}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._held.values()))
        return out


def network() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(weight.shape, generator=generator) for key, weight in network().state_dict().items()
    }


def write(folder: Path, suffix: str) -> list[Path]:
    """Two shards and their index."""
    stem, weights = ("model" if suffix == "safetensors" else "pytorch_model"), state()
    files = {}
    for number in (1, 2):
        name = f"{stem}-{number}.{suffix}"
        shard = {key: weights[key] for key in list(weights)[number - 1 :: 2]}
        save_file(shard, folder / name) if suffix == "safetensors" else torch.save(shard, folder / name)
        files |= dict.fromkeys(shard, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return weight_files(folder)


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_loading_takes_the_network_and_one_tensor(
    tmp_path: Path, suffix: str, dtype: torch.dtype | None
) -> None:
    paths, made = write(tmp_path, suffix), network()
    weights = read_files(paths)
    assert len(paths) == 2
    assert all(mapped(path) for path in paths)
    with Peak(weights) as peak:
        load_strict(made, weights, dtype=dtype, **WORDS)
    held = made.state_dict()
    size = sum(tensor.nbytes for tensor in held.values())
    assert size <= peak.bytes <= size + 64 * 64 * 4
    del weights
    assert not any(mapped(path) for path in paths)
    for key, weight in state().items():
        assert torch.equal(held[key], weight.to(dtype or torch.float32)), key


def test_some_weights_may_stay_in_float32() -> None:
    made = network()
    load_strict(made, state(), dtype=torch.bfloat16, float32=("3.", "5.bias"), **WORDS)
    kept = {key for key, tensor in made.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {"3.weight", "3.bias", "5.bias"}


def test_everything_that_disagrees_is_named() -> None:
    weights = state()
    del weights["0.weight"], weights["1.bias"]
    weights |= {"more": torch.zeros(1), "2.weight": torch.zeros(2, 64)}
    made = network()
    with pytest.raises(ValueError, match="here is not a checkpoint of Tiny, 4 weights disagree") as caught:
        load_strict(made, weights, **WORDS)
    assert str(caught.value).endswith(
        "disagree: missing 0.weight, 1.bias; unexpected more; 2.weight is [2, 64], expected [64, 64]; fetch it"
    )
    assert all(tensor.is_meta for tensor in made.state_dict().values())


def test_a_network_partly_on_the_meta_device_is_refused() -> None:
    made = network()
    made[0] = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="10 of 12 tensors are on the meta device; expected all or none"):
        load_strict(made, state(), **WORDS)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "weights.bin")
    assert read_file(tmp_path / "weights.bin") == [1, 2]
    with pytest.raises(ValueError, match=r"weights\.bin holds a list, expected a dictionary of tensors"):
        read_files([tmp_path / "weights.bin"])


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_weights_are_moved_file_by_file(tmp_path: Path, ending: str) -> None:
    """While the second file is copied the first one is mapped no more, and a float32 copy of all never exists."""
    shards = [{f"{shard}.{i}": torch.full((256, 256), float(i)) for i in range(3)} for shard in range(2)]
    paths = [tmp_path / f"part-{number}.{ending}" for number in range(2)]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path) if ending == "safetensors" else torch.save(shard, path)
    weights = read_files(paths)
    mapped: dict[str, list[bool]] = {}

    class Watched(dict[str, Tensor]):
        def pop(self, name: str) -> Tensor:  # type: ignore[override]
            maps = Path("/proc/self/maps").read_text()
            mapped[name] = [str(path) in maps for path in paths]
            return super().pop(name)

    watched = Watched(weights)
    del weights
    moved = move_in_order(watched, torch.bfloat16)
    assert not watched
    assert list(moved) == [name for shard in shards for name in shard]
    assert all(value.dtype == torch.bfloat16 for value in moved.values())
    assert all(float(value[0, 0]) == float(name[-1]) for name, value in moved.items())
    if ending == "bin":
        assert mapped["0.0"] == [True, True]
        assert mapped["1.1"] == [False, True]


def test_weights_that_are_no_floats_keep_their_type() -> None:
    moved = move_in_order({"table": torch.arange(3), "weight": torch.ones(2)}, torch.bfloat16)
    assert {name: value.dtype for name, value in moved.items()} == {
        "table": torch.int64,
        "weight": torch.bfloat16,
    }


@pytest.mark.parametrize(
    "name",
    [
        "../out.safetensors",
        "/etc/hostname",
        "sub/../../out.safetensors",
        "link.safetensors",
        "..\\out",
        "x" * 300,
    ],
)
def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json names the file|is a symbolic link to .*, outside of"):
        weight_files(folder)


def test_a_zip_file_that_says_it_holds_more_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "scorer.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scorer/data.pkl", bytes(1 << 22))
    with pytest.raises(
        ValueError, match=r"scorer\.pt has \d+ bytes and says that it holds 4194304, expected at most"
    ):
        read_file(path)


@pytest.mark.parametrize(
    "value",
    [1.0, None, "x", torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), {"weight": torch.zeros(1)}],
)
def test_only_plain_tensors_are_weights(tmp_path: Path, value: object) -> None:
    torch.save({"fine": torch.zeros(1), "odd": value}, tmp_path / "scorer.pt")
    with pytest.raises(ValueError, match=r"not a plain dictionary of tensors: odd is something else"):
        read_files([tmp_path / "scorer.pt"])
