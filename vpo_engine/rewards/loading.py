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
from tokenizers import Tokenizer
from torch import Tensor, nn

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = tuple(f"{name}.index.json" for name in WHOLE)
_SHOWN = 4


def local_folder(folder: str | Path, remedy: str) -> Path:
    """The folder's path. ``remedy``: the sentence that ends an error. FileNotFoundError where there is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}; {remedy}")
    return folder


def read_json(folder: str | Path, name: str, remedy: str) -> dict[str, Any]:
    """The object in a folder's JSON file.

    FileNotFoundError where folder or file is missing, ValueError for a file that is no JSON object; both end with
    ``remedy``.
    """
    folder = local_folder(folder, remedy)
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


def read_config(folder: str | Path, model_type: str, remedy: str) -> dict[str, Any]:
    """The object in config.json. Errors as of ``read_json``, and ValueError for another ``model_type``."""
    fields = read_json(folder, "config.json", remedy)
    kind = fields.get("model_type")
    if kind != model_type:
        raise ValueError(
            f"{Path(folder) / 'config.json'} has model_type {kind!r}, expected {model_type!r}; {remedy}"
        )
    return fields


def find_file(folder: Path, names: Sequence[str], remedy: str) -> Path:
    """The first of these files that exists. FileNotFoundError where none does, naming the last: the published one."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {names[-1]} in {folder}; {remedy}")


def read_weights(folder: str | Path, remedy: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, on the CPU, in the files' types.

    From the first that exists of model.safetensors (the shards of its index, or itself), pytorch_model.bin (likewise)
    and the files ``names``. FileNotFoundError where none or a shard is missing, ValueError for a file that cannot be
    read.
    """
    folder = Path(folder)
    for whole, index in zip(WHOLE, INDEXES, strict=True):
        if (folder / index).is_file():
            shards = shard_files(folder, index, remedy)
            return {key: weight for path in shards for key, weight in read_file(path).items()}
        if (folder / whole).is_file():
            return read_file(folder / whole)
    for name in names:
        if (folder / name).is_file():
            return read_file(folder / name)
    wanted = " or ".join((*WHOLE, *names))
    raise FileNotFoundError(f"no weight file in {folder}, expected {wanted}; {remedy}")


def shard_files(folder: Path, index: str, remedy: str) -> list[Path]:
    """The weight files that the index names. FileNotFoundError where one is missing."""
    paths = [folder / name for name in sorted(set(read_json(folder, index, remedy)["weight_map"].values()))]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no weight file {path.name} in {folder}; {remedy}")
    return paths


def read_file(path: Path) -> dict[str, Any]:
    """What a .safetensors file, or a pickle of tensors (``weights_only``), holds; tensors on the CPU."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); fetch it again") from error


def read_under(path: Path, key: str, remedy: str) -> dict[str, Tensor]:
    """The weights of a file, in a pickle those under ``key``. ValueError as of ``read_file``, and where it lacks it."""
    content = read_file(path)
    if path.suffix == ".safetensors":
        return content
    if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
        raise ValueError(f'{path} holds no "{key}"; {remedy}')
    return dict(content[key])


def check_weights(
    network: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    where: str | Path,
    model: str,
    remedy: str,
) -> None:
    """ValueError unless the keys and shapes of weights are exactly those of the network's state dict.

    ``where`` and ``model`` are named in it.
    """
    expected = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    faults = [f"missing {key}" for key in expected if key not in shapes]
    faults += [f"unexpected {key}" for key in shapes if key not in expected]
    faults += [
        f"{key} is {list(shapes[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]
    if faults:
        raise ValueError(
            f"{where} is not a checkpoint of {model}, {len(faults)} weights disagree: "
            f"{'; '.join(faults[:_SHOWN])}; {remedy}"
        )


def load_strict(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    where: str | Path,
    model: str,
    remedy: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    float32: tuple[str, ...] = (),
) -> None:
    """Give a network made on the meta device its weights, copied to ``device`` and, floating ones, to ``dtype``.

    ``float32``: beginnings of the keys that are kept in float32 instead. ValueError as of ``check_weights``. Buffers
    outside of the state dict stay as they are: make them in forward, or afterwards.
    """
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    check_weights(network, shapes, where=where, model=model, remedy=remedy)

    def kind(key: str, weight: Tensor) -> torch.dtype | None:
        if not weight.is_floating_point():
            return None
        return torch.float32 if key.startswith(float32) else dtype

    kept = {key: weight.to(device, kind(key, weight), copy=True) for key, weight in weights.items()}
    network.load_state_dict(kept, strict=True, assign=True)


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """What the tokenizer reads as special tokens wherever a text has it."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def read_tokenizer(path: Path, expected: Mapping[str, int | None], vocabulary: int, remedy: str) -> Tokenizer:
    """A tokenizer.json, whole texts in, no padding.

    ``expected``: special tokens it must have, with the id where the model's config gives one. ``vocabulary``: rows of
    the model's embedding. FileNotFoundError without the file, ValueError for one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; {remedy}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class it raises
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for token, wanted in expected.items():
        found = tokenizer.token_to_id(token)
        if found is None or (wanted is not None and found != wanted):
            raise ValueError(f"{path} gives {token} the id {found}, expected {wanted or 'one'}; {remedy}")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= vocabulary:
        raise ValueError(f"{path} has ids up to {highest} for the model's {vocabulary} embeddings; {remedy}")
    return tokenizer
