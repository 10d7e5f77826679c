"""Read the weights of a TorchScript archive, in which OpenAI publishes CLIP, without running the program in it.

An archive is a zip file. ``data.pkl`` is a pickle of the modules, whose classes are described by text under ``code/``;
the bytes of the tensors lie in ``data/``. ``torch.jit.load`` runs the ``__setstate__`` of these classes. Here modules
become dictionaries, and the text is only searched for the names of parameters and buffers.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATE = re.compile(r"__(?:parameters|buffers)__ = \[([^\]]*)\]")
_CLASS = re.compile(r"^class (\w+)\(Module\):", re.MULTILINE)
_DEEPEST = 200
"""The deepest nesting of modules."""
_MOST_TEXT = 64 << 20
"""Bytes of all text of an archive; it is packed."""


def is_script(path: Path) -> bool:
    """Return whether the file is a TorchScript archive, which has code in it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # a damaged directory can raise nearly anything; what reads the file then says so
        return False


def read_script(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers by name, as the state dict of the program would have them.

    Raise ValueError for an archive that cannot be read, that asks for other objects than modules and tensors, or that
    says that it holds more than it has bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, text = _check(archive, path.stat().st_size)
            module = _Unpickler(archive, root).load()
            return dict(_tensors(module, text, ""))
    except Exception as error:  # a damaged or hostile archive can raise nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} cannot be read as a TorchScript archive ({reason}); fetch it again"
        ) from error


def _check(archive: zipfile.ZipFile, size: int) -> tuple[str, dict[str, set[str]]]:
    """Return the archive's folder, and the names of parameters and buffers of each class."""
    names = archive.namelist()
    root = next(name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl"))
    code = [name for name in names if name.startswith(f"{root}code/") and name.endswith(".py")]
    sizes = {member.filename: member.file_size for member in archive.infolist()}
    if sum(sizes[name] for name in code) > _MOST_TEXT:
        raise ValueError(f"its text has more than {_MOST_TEXT} bytes")
    if sum(size for name, size in sizes.items() if name.startswith(f"{root}data")) > size:
        raise ValueError("it says that it holds more than it has bytes")
    states: dict[str, set[str]] = {}
    for name in code:
        place = name.removeprefix(f"{root}code/").removesuffix(".py").replace("/", ".")
        text = archive.read(name).decode()
        starts = [*_CLASS.finditer(text)]
        edges = [*(start.start() for start in starts), len(text)]
        for start, end in zip(starts, edges[1:], strict=True):
            lists = _STATE.findall(text[start.end() : end])
            states[f"{place}.{start[1]}"] = {
                word for each in lists for word in re.findall(r"\"(\w+)\"", each)
            }
    return root, states


class _Module:
    """A module of the archive: the name of its class and its attributes."""

    kind = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = dict(state)


def _tensors(
    module: Any, states: dict[str, set[str]], prefix: str, depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Module) or depth > _DEEPEST:
        raise ValueError("it holds no modules, or they are nested without end")
    own = states.get(module.kind, set())
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _tensors(value, states, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, Tensor) and name in own:
            yield f"{prefix}{name}", value


class _Unpickler(pickle.Unpickler):
    """A reader of ``data.pkl`` that makes modules and tensors, and refuses every other class."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("Module", (_Module,), {"kind": f"{module}.{name}"})
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return name
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the flat tensor of a storage: ("storage", class, key, device, number of elements)."""
        _, storage, key, _, count = pid
        if not re.fullmatch(r"\w+", str(key)):
            raise ValueError(f"it names the storage {key!r}")
        content = bytearray(self._archive.read(f"{self._root}data/{key}"))
        found = torch.frombuffer(content, dtype=_STORAGES[storage]) if content else torch.empty(0)
        if len(found) != count:
            raise ValueError(f"storage {key} has {len(found)} values, expected {count}")
        return found


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuilt(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object
) -> Tensor:
    """Return the tensor of a storage; torch refuses one that reaches beyond it."""
    return storage.as_strided(size, stride, offset)
