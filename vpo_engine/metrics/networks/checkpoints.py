"""Read the published checkpoint files of the networks that metrics look through."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpo_engine.weights import read_file


def read_state(path: Path, network: str, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights in a checkpoint file, without the prefix ``module.`` of parallel training.

    ``wrappers``: keys under which the weights may lie in the file. A TorchScript archive, as OpenAI publishes CLIP, is
    opened as one. Raise ValueError for a file that cannot be read or holds no weights.
    """
    content = _read_script(path) if _is_script(path) else read_file(path)
    for key in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(each, Tensor) for each in content.values()):
        raise ValueError(
            f"{path} holds no weights of {network}: expected tensors by name"
            + (f", or under {' or '.join(wrappers)}" if wrappers else "")
            + "; fetch the published file again"
        )
    return {key.removeprefix("module."): weight for key, weight in content.items()}


def size_of(weights: Mapping[str, Tensor], key: str, dimension: int, network: str) -> int:
    """Return a size of the network, as one weight tells it. Raise ValueError where that weight is missing."""
    if key not in weights or weights[key].ndim <= dimension:
        raise ValueError(
            f"these are no weights of {network}, {key} is missing; give the checkpoint of {network}"
        )
    return weights[key].shape[dimension]


def depth_of(weights: Mapping[str, Tensor], blocks: str) -> int:
    """Return how many blocks there are under keys that begin with ``blocks`` and a number."""
    numbers = {key.removeprefix(blocks).partition(".")[0] for key in weights if key.startswith(blocks)}
    return len(numbers)


def _is_script(path: Path) -> bool:
    """Return whether the file is a TorchScript archive, which has code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_script(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a TorchScript archive ({reason}); fetch it again"
        ) from error
