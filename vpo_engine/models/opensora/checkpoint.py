"""Strict loading and saving of model weights in the layouts of the published repositories.

Weights are read as ``vpo_engine.weights`` reads them; nothing here reaches the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vpo_engine import weights

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def load_config(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a model folder (or of the folder that a weights file lies in)."""
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


def load_strict(module: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Load weights into ``module``; every key must be there, none more, each of the right shape.

    path: a .safetensors or .bin file, or a folder with model.safetensors, pytorch_model.bin, or an index of shards of
    either. Parameters keep their device and dtype; those on the meta device become tensors on the CPU, in ``dtype`` or
    else in the file's. Raise FileNotFoundError where a file is missing; ValueError where one is damaged or does not
    fit, and then the module is as it was.
    """
    remedy = f"check that the weights and {CONFIG} belong together"
    model = type(module).__name__
    weights.load_strict(module, read_weights(path), where=path, model=model, remedy=remedy, dtype=dtype)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a weights file or a model folder, mapped, on the CPU; see ``load_strict``."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a folder with {WEIGHTS}, or a weights file")
    if path.is_file() and path.suffix not in (".safetensors", ".bin"):
        raise ValueError(f"{path}: expected a .safetensors or .bin file")
    paths = [path] if path.is_file() else weights.weight_files(path)
    if not paths:
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{path} holds no weights: expected {', '.join(weights.WHOLE)}, or an .index.json with its shards; found "
            f"{held}"
        )
    state = weights.read_files(paths)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a plain dictionary of tensors")
    return state


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
