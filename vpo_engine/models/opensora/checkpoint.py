"""Strict loading and saving of model weights in the layouts of the published repositories.

Nothing here reaches the network. Pickled shards go through ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PICKLED = "pytorch_model.bin"
_SHOWN = 3


def load_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a model folder (or of the folder that a weights file lies in)."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected an object of settings")
    return config


def load_strict(module: nn.Module, path: str | Path) -> None:
    """Load weights into ``module``; every key must be there, none more, each of the right shape.

    path: a .safetensors or .bin file, or a folder with model.safetensors, pytorch_model.bin, or an index of
    shards of either. Parameters keep their device and dtype; those on the meta device become the loaded
    tensors, in the file's dtype, on the CPU. FileNotFoundError where a file is missing; ValueError where one
    is damaged or does not fit, and then the module is as it was.
    """
    state = read_weights(path)
    expected = module.state_dict()
    _check_fit(state, expected, type(module).__name__, Path(path))
    _check_all_or_none_meta(expected)
    module.load_state_dict(state, strict=True, assign=any(tensor.is_meta for tensor in expected.values()))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file or a model folder, on the CPU; see ``load_strict``."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a folder with {WEIGHTS}, or a weights file")
    if path.is_file():
        return _read_file(path)
    for name in _INDEXES:
        if (path / name).is_file():
            return _read_shards(path / name)
    for name in (WEIGHTS, _PICKLED):
        if (path / name).is_file():
            return _read_file(path / name)
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path} holds no weights: expected {WEIGHTS}, {_PICKLED}, or an .index.json with its shards; "
        f"found {held}"
    )


def save_pretrained_layout(
    module_state: Mapping[str, Tensor], config: Mapping[str, Any], folder: str | Path
) -> None:
    """Write model.safetensors and config.json, as the published repositories lay them out.

    The folder is made if need be; existing files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in module_state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file} is not a readable weights file ({error}); download it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{file} is not a plain dictionary of tensors")
        return state
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a .safetensors or .bin file")
    try:
        return load_file(file)
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} is damaged or incomplete ({size} bytes: {error}); download or copy it again"
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Every shard named by an index; its keys must be those the index promises."""
    try:
        promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(promised.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error!r}); download it again") from error
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(shards)} shards, of which {len(missing)} are missing: {_some(missing)}"
        )
    state: dict[str, Tensor] = {}
    for shard in shards:
        state.update(_read_file(index.parent / shard))
    absent = sorted(set(promised) - set(state))
    if absent:
        raise ValueError(f"the shards of {index} lack {len(absent)} of its keys: {_some(absent)}")
    return state


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, path: Path) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} is {list(state[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    faults = [f"{len(keys)} keys {fault} ({_some(keys)})" for fault, keys in found.items() if keys]
    if faults:
        raise ValueError(
            f"{path} does not fit this {kind} of {len(expected)} tensors: {'; '.join(faults)}. "
            f"Check that the weights and {CONFIG} belong together"
        )


def _check_all_or_none_meta(expected: Mapping[str, Tensor]) -> None:
    count = sum(tensor.is_meta for tensor in expected.values())
    if count not in (0, len(expected)):
        raise ValueError(f"{count} of {len(expected)} tensors are on the meta device; expected all or none")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
