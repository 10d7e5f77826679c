"""Strict loading and saving of model weights in the layouts of the published repositories.

Weights are read as ``vpo_engine.weights`` reads them; nothing here reaches the network.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vpo_engine import weights
from vpo_engine.foreign_files import read_settings
from vpo_engine.models.opensora.stdit3_config import CONFIG

WEIGHTS = "model.safetensors"
TRAINED = "model"
"""The folder of the weights in a folder that Open-Sora's training wrote, and that its ``--ckpt-path`` reads."""
_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_NO_MODEL = (
    "ema.",
    "adapter_model.",
    "optimizer",
    "pytorch_optim",
    "scheduler",
    "training_args",
    "rng_state",
)
"""How files of weights begin that are not those of the model: its averages, adapters, and what training leaves."""


def load_config(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a model folder (or of the folder that a weights file lies in)."""
    return read_settings(config_file(path), "download it again")


def config_file(path: str | Path) -> Path:
    """Return the path of the config.json of a model folder, or of that which a weights file lies in.

    FileNotFoundError where there is none.
    """
    path = Path(path)
    file = weights.config_file(path)
    if file is None:
        missing = (path if path.is_dir() else path.parent) / CONFIG
        raise FileNotFoundError(f"{missing} is missing; a model folder holds {CONFIG} and {WEIGHTS}")
    return file


def load_strict(
    module: nn.Module,
    path: str | Path,
    dtype: torch.dtype | None = None,
    remedy: str = f"check that the weights and {CONFIG} belong together",
    mapped: Collection[str] = (),
) -> None:
    """Load weights into ``module``; every key must be there, none more, each of the right shape.

    path: as ``find_weights`` takes it. remedy: what to do if the weights do not fit. mapped: see
    ``weights.load_strict``. Parameters keep their device and
    dtype; those on the meta device become tensors on the CPU, in ``dtype`` or else in the file's. Raise
    FileNotFoundError where a file is missing; ValueError where one is damaged or does not fit, and then the module is
    as it was.
    """
    model = type(module).__name__
    weights.load_strict(
        module, read_weights(path), where=path, model=model, remedy=remedy, dtype=dtype, mapped=mapped
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a weights file or a model folder, mapped, on the CPU; see ``load_strict``."""
    return weights.read_files(find_weights(Path(path)))


def find_weights(path: Path) -> list[Path]:
    """Return the weight files of a model in any layout that Open-Sora, ColossalAI and transformers write.

    path: a file (.safetensors, .bin, .pt or .pth, or the index of shards), or a folder. A folder has model.safetensors,
    pytorch_model.bin, an index of shards, or a folder ``model`` with one of these, as Open-Sora's training writes it,
    or else one weight file of any name. FileNotFoundError where there is none; ValueError where several could be meant.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a folder with {WEIGHTS}, or a weights file")
    if path.is_file():
        if path.match("*.index*.json"):
            return weights.shard_files(path)
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"{path}: expected a file that ends in {', '.join((*_SUFFIXES, _INDEX))}")
        return [path]
    if found := _whole_or_sharded(path):
        return found
    if (path / TRAINED).is_dir():
        return find_weights(path / TRAINED)
    files = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES and not _no_model(file)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several weight files ({names}); give the path of one of them")
    if not files:
        raise FileNotFoundError(_nothing_in(path))
    return files


def _whole_or_sharded(folder: Path) -> list[Path]:
    """Return the weight files of a folder that have the usual names, or that an index names; [] if there are none."""
    if found := weights.weight_files(folder):
        return found
    indices = sorted(
        folder.glob("*.index*.json"), key=lambda file: ("safetensors" not in file.name, file.name)
    )
    indices = [index for index in indices if not _no_model(index)]
    if len(indices) > 1 and ("safetensors" in indices[0].name) == ("safetensors" in indices[1].name):
        names = ", ".join(index.name for index in indices)
        raise ValueError(f"{folder} holds several indices of shards ({names}); give the path of one of them")
    return weights.shard_files(indices[0]) if indices else []


def _no_model(file: Path) -> bool:
    return file.name.startswith(_NO_MODEL)


def _nothing_in(folder: Path) -> str:
    """Return why a folder without weights is refused, and what was probably meant."""
    averaged = [folder / f"ema{suffix}" for suffix in _SUFFIXES if (folder / f"ema{suffix}").is_file()]
    if averaged:
        return (
            f"{folder} holds no trained weights (no folder {TRAINED}), only averaged ones; to take those give "
            f"{averaged[0]}"
        )
    if any(folder.glob("adapter_model.*")):
        return (
            f"{folder} holds a LoRA adapter, not a whole model; merge it into its base (PEFT's merge_and_unload) and "
            "give the folder of the result"
        )
    inside = sorted((*folder.glob("*/model"), *folder.glob("policy"), *folder.glob("checkpoints/*/policy")))
    if inside:
        last = max(inside, key=lambda entry: entry.stat().st_mtime)
        meant = last.parent if last.name == TRAINED else last
        return f"{folder} holds no weights of its own; did you mean {meant}?"
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    return (
        f"{folder} holds no weights: expected {', '.join(weights.WHOLE)}, an .index.json with its shards, or a folder "
        f"{TRAINED} with one of these; found {held}"
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


def write_public_index(folder: str | Path) -> None:
    """Let the public code's ``--ckpt-path`` read a folder that ``save_pretrained_layout`` wrote.

    That loader (Open-Sora v1.2, opensora/utils/ckpt_utils.py) reads shards by an index in the folder ``model`` inside.
    The index written here names the one file beside that folder.
    """
    file = Path(folder) / WEIGHTS
    with safe_open(file, framework="pt") as tensors:
        names = sorted(tensors.keys())
    index = {
        "metadata": {"total_size": file.stat().st_size},
        "weight_map": dict.fromkeys(names, f"../{WEIGHTS}"),
    }
    inside = Path(folder) / TRAINED
    inside.mkdir(exist_ok=True)
    (inside / f"{WEIGHTS}{_INDEX}").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
