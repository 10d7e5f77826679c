"""Files of low-rank adapters in the dialects that are in use, read and written.

| dialect | names of the tensors | scale |
|---|---|---|
| PEFT | ``base_model.model.MODULE.lora_A.weight`` | adapter_config.json beside the file |
| diffusers | ``transformer.MODULE.lora_A.weight`` | metadata entry ``lora_adapter_metadata``, or else 1 |
| original | ``diffusion_model.ORIGINAL.lora_A.weight`` or ``.lora_down.weight`` | ``.alpha``, or else 1 |
| flat | ``lora_unet_ORIGINAL.lora_down.weight``, with _ in place of dots | ``.alpha``, or else 1 |

MODULE is the network's own name of a linear layer, ORIGINAL the name in the model's first project, which the family
tells (``VideoModel.original_name``). Adapters that are written here have their scale in B, and nowhere else.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vpo_engine.config import LoraConfig
from vpo_engine.foreign_files import read_object
from vpo_engine.models.lora import CONFIG, WEIGHTS, adapter_parameters

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name under which ``pipeline.load_lora_weights`` looks for an adapter in a folder."""
OriginalName = Callable[[str], str | None]
"""A function of a module's name; it returns the name in the model's first project, or None if there is none."""

_PEFT, _DIFFUSERS, _ORIGINAL, _FLAT = "base_model.model.", "transformer.", "diffusion_model.", "lora_unet_"
_METADATA = "lora_adapter_metadata"
_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_SHOWN = 3
_MOST_REPEATS = 3
"""How many repetitions a pattern in an adapter's configuration may have."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: by module name (A, B), [rank, in] and [out, rank]; B @ A is added to the weight.

    The scale alpha / rank is part of B. Ranks may differ between modules.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """Return the largest rank."""
        return max(down.shape[0] for down, _ in self.layers.values())

    def settings(self) -> LoraConfig:
        """Return the settings of ``model.lora`` with which a network gets an adapter that can hold this one."""
        return LoraConfig(rank=self.rank, alpha=float(self.rank), targets=tuple(self.layers))

    @torch.no_grad()
    def put_into(self, network: nn.Module) -> None:
        """Copy the weights into the adapter that ``settings`` made; smaller ranks are filled up with zeros."""
        own = adapter_parameters(network)
        for name, (down, up) in self.layers.items():
            for side, values in (("A", down), ("B", up)):
                target = own[f"{_PEFT}{name}.lora_{side}.weight"].zero_()
                target[: values.shape[0], : values.shape[1]].copy_(values)


@torch.no_grad()
def adapter_of(network: nn.Module) -> Adapter:
    """Return a copy of the adapter that a network has, in float32 on the CPU; its scale goes into B."""
    own = adapter_parameters(network)
    names = [name.removesuffix(".lora_A.weight") for name in own if name.endswith(".lora_A.weight")]
    layers = {}
    for name in names:
        module = name.removeprefix(_PEFT)
        scaling: Any = network.get_submodule(module).scaling
        down, up = (
            own[f"{name}.lora_{side}.weight"].detach().to("cpu", torch.float32, copy=True) for side in "AB"
        )
        layers[module] = (down, up * scaling["default"])
    return Adapter(layers)


@torch.no_grad()
def merge_adapter(network: nn.Module) -> None:
    """Add the adapter to the weights, in their own type, and take it off: the network is a plain one afterwards."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.merge(safe_merge=True, adapter_names=["default"])
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.base_layer)
    del network.peft_config


def save_diffusers(adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    """Write the file that ``pipeline.load_lora_weights`` takes."""
    _save(adapter, folder, dtype, lambda name: _DIFFUSERS + name)


def save_original(adapter: Adapter, folder: Path, dtype: torch.dtype, original_name: OriginalName) -> None:
    """Write the file with the names of the model's first project, as ComfyUI reads it.

    ValueError names a module for which there is no such name.
    """
    nameless = [name for name in adapter.layers if original_name(name) is None]
    if nameless:
        raise ValueError(
            f"--format original: the original project has no name for {_some(nameless)}; leave --format out"
        )
    _save(adapter, folder, dtype, lambda name: f"{_ORIGINAL}{original_name(name)}")


def _save(adapter: Adapter, folder: Path, dtype: torch.dtype, named: Callable[[str], str]) -> None:
    tensors = {}
    for name, sides in adapter.layers.items():
        for side, values in zip("AB", sides, strict=True):
            tensors[f"{named(name)}.lora_{side}.weight"] = values.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / DIFFUSERS_FILE, metadata={"format": "pt"})


# reading


def find_adapter(path: Path) -> Path | None:
    """Return the adapter's file: ``path`` itself, or the one in a folder; None if the path holds no adapter.

    Nothing but names is looked at. ValueError where a folder holds several files that could be meant.
    """
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    for name in (WEIGHTS, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    files = [file for file in files if "lora" in file.name.lower() or "adapter" in file.name.lower()]
    if len(files) > 1:
        raise ValueError(
            f"{path} holds several adapters ({', '.join(file.name for file in files)}); give one file"
        )
    return files[0] if files else None


def read_adapter(file: Path, network: nn.Module, original_name: OriginalName, model: str) -> Adapter:
    """Read an adapter for ``network`` (which may be on the meta device and have no adapter yet), in any dialect.

    model: what errors call the network. ValueError for a file that is no adapter, binds only partly or not at all to
    the network, or is damaged. Source of the dialects: diffusers 0.42.1, loaders/lora_conversion_utils.py.
    """
    tensors, metadata = _read(file)
    linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    stems = _stems(linear, original_name)
    found: dict[str, dict[str, Tensor]] = {}
    unbound, peft_names = [], False
    for key, tensor in tensors.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        module = stems.get(key.removesuffix(end)) if end else None
        if end is None or module is None:
            unbound.append(key)
            continue
        peft_names = peft_names or key.startswith(_PEFT)
        found.setdefault(module, {})[_ENDS[end]] = tensor
    if unbound:
        raise ValueError(_unbound_text(file, list(tensors), unbound, stems, model))
    if not found:
        raise ValueError(f"{file} holds no tensors, so there is no adapter in it; copy it again")
    fields = _peft_fields(file) if peft_names else _diffusers_fields(file, metadata)
    return Adapter(
        {name: _layer(file, name, parts, fields, linear[name], model) for name, parts in found.items()}
    )


def _stems(linear: Mapping[str, nn.Linear], original_name: OriginalName) -> dict[str, str]:
    """Return by every name that a dialect has for a layer the layer's module name."""
    stems = {prefix + name: name for name in linear for prefix in (_PEFT, _DIFFUSERS)}
    for name in linear:
        original = original_name(name)
        if original is not None:
            stems[_ORIGINAL + original] = name
            stems[_FLAT + original.replace(".", "_")] = name
    return stems


def _layer(
    file: Path,
    name: str,
    parts: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    layer: nn.Linear,
    model: str,
) -> tuple[Tensor, Tensor]:
    missing = {"down", "up"} - parts.keys()
    if missing:
        lacking = "lora_A (lora_down)" if "down" in missing else "lora_B (lora_up)"
        raise ValueError(f"{file}: {name} has no {lacking}, so the file is incomplete; copy it again")
    down, up = parts["down"].float(), parts["up"].float()
    if down.ndim != 2 or up.ndim != 2:
        raise ValueError(
            f"{file}: the adapter of {name} has tensors of shapes {list(down.shape)} and {list(up.shape)}, expected "
            "two matrices; copy it again"
        )
    rank = down.shape[0]
    expected = ((rank, layer.in_features), (layer.out_features, rank))
    if (tuple(down.shape), tuple(up.shape)) != expected:
        raise ValueError(
            f"{file}: the adapter of {name} maps {down.shape[-1]} to {up.shape[0]} values through {list(down.shape)} "
            f"and {list(up.shape)}, but the layer of this {model} maps {layer.in_features} to {layer.out_features}; "
            "give the base that the adapter was trained on"
        )
    alpha = _number(file, name, parts["alpha"]) if "alpha" in parts else _alpha(file, fields, name, rank)
    scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") and "alpha" not in parts else rank)
    if not (torch.isfinite(down).all() and torch.isfinite(up).all() and math.isfinite(scale)):
        raise ValueError(f"{file}: the adapter of {name} has values that are not finite; copy it again")
    return down, up * scale


def _alpha(file: Path, fields: Mapping[str, Any], name: str, rank: int) -> float:
    """Return the alpha of a module by the fields of PEFT's LoraConfig; without them the scale is 1.

    Raise ValueError for a pattern with more than _MOST_REPEATS repetitions, or with one of a group: to match such a
    pattern can take for ever.
    """
    patterns = fields.get("alpha_pattern") or {}
    found = fields.get("lora_alpha", rank)
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: alpha_pattern is a {type(patterns).__name__}; copy the adapter again")
    for pattern, value in patterns.items():
        if len(re.findall(r"[*+{]", pattern)) > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
            raise ValueError(
                f"{file}: the pattern {pattern[:100]!r} of alpha_pattern repeats too much to be matched; write the "
                "names of the modules in its place"
            )
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{file}: {pattern[:100]!r} in alpha_pattern is no regular expression ({error}); copy the adapter again"
            ) from error
        if matches:
            found = value
            break
    return _number(file, name, found)


def _number(file: Path, name: str, value: object) -> float:
    """Return a number or a tensor of one as a float."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    raise ValueError(
        f"{file}: the alpha of {name} is {str(value)[:100]}, expected a number; copy the adapter again"
    )


def _peft_fields(file: Path) -> dict[str, Any]:
    path = file.with_name(CONFIG)
    if not path.is_file():
        raise ValueError(
            f"{file} has the names of PEFT, whose scale stands in {CONFIG}, and there is none beside it; give the "
            "whole folder of the adapter"
        )
    return read_object(path, "copy the adapter again")


def _diffusers_fields(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's fields of the entry that diffusers writes; they are those of the transformer."""
    try:
        packed = json.loads(metadata[_METADATA]) if _METADATA in metadata else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: the entry {_METADATA} of its header is not JSON ({error}); copy it again"
        ) from error
    if not isinstance(packed, dict):
        raise ValueError(f"{file}: the entry {_METADATA} of its header is no object; copy it again")
    return {
        key.removeprefix(_DIFFUSERS): value for key, value in packed.items() if key.startswith(_DIFFUSERS)
    }


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; check the path of the adapter")
    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except Exception as error:  # damaged headers raise more than SafetensorError
        size = file.stat().st_size
        raise ValueError(
            f"{file} is damaged, incomplete or no safetensors file ({size} bytes: {error}); copy it again"
        ) from error


def _unbound_text(
    file: Path, keys: list[str], unbound: list[str], stems: Mapping[str, str], model: str
) -> str:
    """Return the error for tensors that belong to no layer, with what the file probably is."""
    if not any("lora" in key or key.endswith(".alpha") for key in keys):
        return f"{file} is no low-rank adapter: it holds {_some(keys)}; give the file of an adapter"
    some = len(unbound) < len(keys)
    count = (
        f"{len(unbound)} of its {len(keys)} tensors belong to no"
        if some
        else "none of its tensors belongs to a"
    )
    known = sorted({_prefix(stem) for stem in stems})
    near = difflib.get_close_matches(unbound[0], stems, n=1, cutoff=0.5)
    hint = f"the nearest name is {near[0]}" if near else f"names begin with {' or '.join(known)}"
    return (
        f"{file} does not fit {model}: {count} linear layer of it, for example {_some(unbound)}; {hint}. Give "
        "an adapter of this model, in one of the dialects of docs/export.md"
    )


def _prefix(stem: str) -> str:
    return next(prefix for prefix in (_PEFT, _DIFFUSERS, _ORIGINAL, _FLAT) if stem.startswith(prefix))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
