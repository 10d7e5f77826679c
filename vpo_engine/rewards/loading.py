"""Reading of published checkpoints of rewards from local folders; nothing here reaches the network.

Weights are read as ``vpo_engine.weights`` reads them. ``remedy`` is the sentence that ends an error: what the folder
should hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vpo_engine.foreign_files import read_settings
from vpo_engine.foreign_settings import check_settings, described_by
from vpo_engine.weights import WHOLE, check_tensors, read_file, read_files, weight_files

CONFIG = "config.json"
Parsed = TypeVar("Parsed")
Network = TypeVar("Network", bound=nn.Module)


def local_folder(folder: str | Path, remedy: str) -> Path:
    """Return the folder's path. Raise FileNotFoundError where there is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}; {remedy}")
    return folder


def read_json(folder: str | Path, name: str, remedy: str) -> dict[str, Any]:
    """Return the object in a folder's JSON file.

    Raise FileNotFoundError where folder or file is missing, ValueError as ``foreign_files.read_settings`` does.
    """
    folder = local_folder(folder, remedy)
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}; {remedy}")
    return read_settings(path, remedy)


def read_config(folder: str | Path, model_type: str, remedy: str) -> dict[str, Any]:
    """Return the object in config.json, the settings of a model of transformers.

    Raise what ``read_json`` does, and ValueError for another ``model_type`` and for values that it cannot have.
    """
    from transformers import CONFIG_MAPPING

    fields, file = read_json(folder, CONFIG, remedy), Path(folder) / CONFIG
    kind = fields.get("model_type")
    if kind != model_type:
        raise ValueError(f"{file} has model_type {kind!r}, expected {model_type!r}; {remedy}")
    check_settings(fields, CONFIG_MAPPING[model_type], file, remedy)
    return fields


def parse_config(kind: type[Parsed], fields: Mapping[str, Any], folder: str | Path, remedy: str) -> Parsed:
    """Return the configuration of transformers that config.json in the folder describes; ValueError if it does not."""
    with described_by(Path(folder) / CONFIG, kind.__name__, remedy):
        parsed: Parsed = kind.from_dict(dict(fields))  # type: ignore[attr-defined]
    return parsed


def build(make: Callable[[], Network], where: str | Path, name: str, remedy: str) -> Network:
    """Return the network that ``make`` makes, on the meta device.

    ValueError, which names ``where`` its sizes are from, if it cannot be made.
    """
    with described_by(where, f"{name} that can be built", remedy), torch.device("meta"):
        return make()


def read_plain_tokenizer(path: Path, remedy: str) -> Tokenizer:
    """Read a tokenizer.json; the tokenizer takes texts of any length, and does not pad. ValueError for another file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class it raises
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_file(folder: Path, names: Sequence[str], remedy: str) -> Path:
    """Return the first of these files that exists. FileNotFoundError, naming the last of them, where none does."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {names[-1]} in {folder}; {remedy}")


def read_weights(folder: str | Path, remedy: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder, mapped, in the files' types.

    They are of the first that exists of model.safetensors (the shards of its index, or itself), pytorch_model.bin
    (likewise) and the files ``names``. Raise FileNotFoundError where none or a shard is missing, ValueError for a
    file that cannot be read.
    """
    paths = weight_files(Path(folder), names)
    if not paths:
        raise FileNotFoundError(
            f"no weight file in {folder}, expected {' or '.join((*WHOLE, *names))}; {remedy}"
        )
    return read_files(paths)


def read_under(path: Path, key: str, remedy: str) -> dict[str, Tensor]:
    """Return a file's weights, under ``key`` in a pickle. Raise ValueError as ``read_file`` does, or without the
    key."""
    content = read_file(path)
    if path.suffix == ".safetensors":
        return content
    if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
        raise ValueError(f'{path} holds no "{key}"; {remedy}')
    check_tensors(content[key], path)
    return dict(content[key])


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the texts that the tokenizer reads as special tokens wherever they occur."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def read_tokenizer(path: Path, expected: Mapping[str, int | None], vocabulary: int, remedy: str) -> Tokenizer:
    """Read a tokenizer.json; the tokenizer takes texts of any length, and does not pad.

    ``expected``: special tokens it must have, with the id where the model's config gives one. ``vocabulary``: how many
    embeddings the model has. Raise FileNotFoundError without the file, ValueError for one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; {remedy}")
    tokenizer = read_plain_tokenizer(path, remedy)
    for token, wanted in expected.items():
        found = tokenizer.token_to_id(token)
        if found is None or (wanted is not None and found != wanted):
            raise ValueError(f"{path} gives {token} the id {found}, expected {wanted or 'one'}; {remedy}")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= vocabulary:
        raise ValueError(f"{path} has ids up to {highest} for the model's {vocabulary} embeddings; {remedy}")
    return tokenizer
