"""Strict loading of weight files into networks, for models and rewards alike; nothing here reaches the network.

Files are mapped into memory, not read: a tensor's bytes are read when it is copied, straight into the type and onto the
device where it stays. So loading takes the memory of the network and of one tensor more. (Pickles written before torch
1.6 cannot be mapped and are read whole.) Pickles are opened with ``weights_only=True`` and run no code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpo_engine.foreign_files import check_archive, file_inside, read_object

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Names of a published model's weights in one file; an index of shards is called NAME.index.json."""
_SHOWN = 4


def read_file(path: Path) -> Any:
    """Return what a .safetensors file, or a pickle of tensors, holds; tensors are on the CPU, mapped.

    Raise ValueError for a file that cannot be read, or says that it holds more than it has bytes.
    """
    safetensors = path.suffix == ".safetensors"
    packed = not safetensors and zipfile.is_zipfile(path)
    if packed:
        check_archive(path)
    try:
        if safetensors:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read ({path.stat().st_size} bytes, damaged, incomplete or no weights: {reason}); fetch "
            "it again"
        ) from error


def weight_files(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Return the weight files of a folder: those of the first of WHOLE or its index, or else the first of ``names``.

    An empty list if there is none; errors are those of ``shard_files``.
    """
    for name in WHOLE:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return shard_files(index)
        if (folder / name).is_file():
            return [folder / name]
    return next(([folder / name] for name in names if (folder / name).is_file()), [])


def shard_files(index: Path) -> list[Path]:
    """Return the weight files that an index names, all of them in its folder.

    Raise FileNotFoundError where one is missing, ValueError for no index and for a name that leads out of the folder.
    """
    promised = _promised(index)
    shards = {name: file_inside(index.parent, name, index) for name in sorted(set(promised.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no weight file {missing[0]} in {index.parent}: {index.name} names {len(shards)} shards, of which "
            f"{len(missing)} are missing: {_some(missing)}"
        )
    return list(shards.values())


def read_files(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the tensors of weight files, mapped.

    Raise ValueError as ``read_file`` does, for a file with anything but tensors by name, and if shards lack a key.
    """
    weights: dict[str, Any] = {}
    for path in paths:
        content = read_file(path)
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{path} holds a {type(content).__name__}, expected a dictionary of tensors; fetch it again"
            )
        check_tensors(content, path)
        weights.update(content)
    for index in sorted(paths[0].parent.glob("*.index*.json")):
        if paths[0].suffix not in index.name:  # of files of another kind, which are not read
            continue
        promised = _promised(index)
        absent = sorted(set(promised) - set(weights))
        if paths[0].name in promised.values() and absent:
            raise ValueError(f"the shards of {index} lack {len(absent)} of its keys: {_some(absent)}")
    return weights


def check_tensors(content: Mapping[Any, Any], where: Path) -> None:
    """Raise ValueError unless a file's content is plain tensors by name: dense ones, with values, on the CPU."""
    other = [
        str(key)[:100] for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))
    ]
    if other:
        raise ValueError(
            f"{where} is not a plain dictionary of tensors: {_some(other)} is something else; fetch it again, or save "
            "the state dict of the network alone"
        )


def _is_plain(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def config_file(path: Path) -> Path | None:
    """Return the config.json that belongs to a model's folder or weights file; None if there is none.

    It lies beside the weights, or in the folder ``model`` there, as Open-Sora's training writes it.
    """
    folder = path if path.is_dir() else path.parent
    found = (folder / "config.json", folder / "model" / "config.json")
    return next((file for file in found if file.is_file()), None)


def check_weights(
    network: nn.Module, weights: Mapping[str, Tensor], *, where: str | Path, model: str, remedy: str
) -> None:
    """Raise ValueError unless the weights have exactly the keys and shapes of the network's state dict.

    The error names what is missing, unexpected and of another shape. ``where``: the file or folder, ``model``: what it
    should be of, ``remedy``: the end of the sentence.
    """
    expected = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} is {list(weights[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    named = (("missing ", missing), ("unexpected ", unexpected), ("", misshapen))
    faults = [fault + _some(keys) for fault, keys in named if keys]
    if faults:
        raise ValueError(
            f"{where} is not a checkpoint of {model}, {len(missing) + len(unexpected) + len(misshapen)} weights "
            f"disagree: {'; '.join(faults)}; {remedy}"
        )


def load_strict(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    where: str | Path,
    model: str,
    remedy: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    float32: tuple[str, ...] = (),
    mapped: Collection[str] = (),
) -> None:
    """Copy weights into a network, one tensor after the other.

    A network made on the meta device gets tensors on ``device``, those with a floating type in ``dtype`` (None: the
    files' own); keys that begin with one of ``float32`` are kept in float32 instead. Keys in ``mapped`` are not copied:
    their tensors stay those of the file, for a caller that replaces them at once. Any other network keeps its own
    devices and types. Raise ValueError as ``check_weights`` does, and then the network is as it was. Buffers outside
    of the state dict stay as they are: make them in forward, or afterwards.
    """
    check_weights(network, weights, where=where, model=model, remedy=remedy)
    expected = network.state_dict()
    on_meta = sum(tensor.is_meta for tensor in expected.values())
    if on_meta not in (0, len(expected)):
        raise ValueError(f"{on_meta} of {len(expected)} tensors are on the meta device; expected all or none")
    if not on_meta:
        network.load_state_dict(weights, strict=True)
        return

    def final(key: str, weight: Tensor) -> Tensor:
        if key in mapped:
            return weight
        kept = torch.float32 if key.startswith(float32) else dtype
        return weight.to(device, kept if weight.is_floating_point() else None, copy=True)

    loaded = {key: final(key, weight) for key, weight in weights.items()}
    network.load_state_dict(loaded, strict=True, assign=True)


def move_in_order(
    weights: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Copy mapped weights to ``device``, those with a floating type in ``dtype`` (None: their own); empty ``weights``.

    Tensors are let go in the order of their files, so that a file is unmapped when its last tensor has been copied:
    this takes the memory of the result and of one file.
    """
    moved = {}
    for name in list(weights):
        weight = weights.pop(name)
        moved[name] = weight.to(device, dtype if weight.is_floating_point() else None, copy=True)
    return moved


def _promised(index: Path) -> dict[str, str]:
    """Return {key: file} of an index. Raise ValueError for a file that is no index."""
    try:
        promised = read_object(index, "").get("weight_map")
        if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
            raise ValueError("it has no weight_map from tensors to names of files")
    except ValueError as error:
        raise ValueError(f"{index} is not an index of shards ({error}); fetch it again") from error
    return promised


def _some(names: Iterable[str]) -> str:
    """Join the first names, and say how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
