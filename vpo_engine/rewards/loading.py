"""Strict loading of published checkpoints from local folders; nothing here reaches the network.

Weights are mapped into memory, not read: what a checkpoint takes is what the network keeps of it.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = tuple(f"{name}.index.json" for name in WHOLE)
_SHOWN = 4


def read_json(folder: str | Path, name: str, remedy: str) -> dict[str, Any]:
    """The object in a folder's JSON file.

    ``remedy``: the sentence that ends an error. FileNotFoundError where folder or file is missing, ValueError for a
    file that is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}; {remedy}")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}; {remedy}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected an object; {remedy}")
    return fields


def read_weights(folder: str | Path, remedy: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, on the CPU, in the files' types.

    From the first that exists of model.safetensors (the shards of its index, or itself), pytorch_model.bin (likewise)
    and the files ``names``. FileNotFoundError where none or a shard is missing, ValueError for a file that cannot be
    read.
    """
    folder = Path(folder)
    for whole, index in zip(WHOLE, INDEXES, strict=True):
        if (folder / index).is_file():
            shards = sorted(set(read_json(folder, index, remedy)["weight_map"].values()))
            for shard in shards:
                if not (folder / shard).is_file():
                    raise FileNotFoundError(f"no weight file {shard} in {folder}; {remedy}")
            return {key: weight for name in shards for key, weight in read_file(folder / name).items()}
        if (folder / whole).is_file():
            return read_file(folder / whole)
    for name in names:
        if (folder / name).is_file():
            return read_file(folder / name)
    wanted = " or ".join((*WHOLE, *names))
    raise FileNotFoundError(f"no weight file in {folder}, expected {wanted}; {remedy}")


def read_file(path: Path) -> dict[str, Any]:
    """What a .safetensors file, or a pickle of tensors (``weights_only``), holds; tensors on the CPU."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); fetch it again") from error


def load_strict(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    where: str | Path,
    model: str,
    remedy: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Give a network made on the meta device its weights, copied to ``device`` and, floating ones, to ``dtype``.

    ValueError unless the keys and shapes are exactly those of the network's state dict. ``where`` and ``model`` are
    named in it. Buffers outside of the state dict stay as they are: make them in forward, or afterwards.
    """
    expected = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    faults = [f"missing {key}" for key in expected if key not in weights]
    faults += [f"unexpected {key}" for key in weights if key not in expected]
    faults += [
        f"{key} is {list(weights[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    if faults:
        raise ValueError(
            f"{where} is not a checkpoint of {model}, {len(faults)} weights disagree: "
            f"{'; '.join(faults[:_SHOWN])}; {remedy}"
        )
    kept = {
        key: weight.to(device, dtype if weight.is_floating_point() else None, copy=True)
        for key, weight in weights.items()
    }
    network.load_state_dict(kept, strict=True, assign=True)
