"""Low-rank adapters (LoRA, arXiv 2106.09685) on a policy network, in PEFT's modules and PEFT's files.

The network stays the object it was: PEFT exchanges its linear layers in place, so ``X.weight`` becomes
``X.base_layer.weight`` beside ``X.lora_A.default.weight`` [rank, in] and ``X.lora_B.default.weight`` [out, rank]. These
are float32 whatever the type of the base, and compute in the type of their input. PEFT is imported only when an adapter
is asked for.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vpo_engine.config import LoraConfig
from vpo_engine.memory.quantised_base import under_autocast
from vpo_engine.seeding import generator
from vpo_engine.video_model import ModelCard
from vpo_engine.weights import read_files

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_ADAPTER = "default"
_PREFIX = "base_model.model."
"""The prefix of module names in PEFT's files: the path to the module in PEFT's own wrappers."""


def inject_adapter(
    network: nn.Module,
    settings: LoraConfig,
    targets: Sequence[str],
    seed: int,
    base: Path | None = None,
) -> list[str]:
    """Give ``network`` an adapter, the only part of it that is trained from now on; return the layers that got one.

    The network computes the same as before, bit for bit: B starts at zero. A is uniform within 1 / sqrt(in), PEFT's
    usual start, drawn from ``seed`` and the layer's name and rounded to bfloat16 values; A and B are float32.
    ``targets``: ends of the names of the layers that get an adapter (see ``chosen_targets``). ``base``: the folder of
    the network's weights, for the adapter's file.

    ValueError: PEFT is missing, a target names no linear layer, or a target names something else as well.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f'model.lora needs PEFT, which cannot be imported ({error}); pip install "vpo-engine[lora]"'
        ) from error
    layers = _targeted(network, targets)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a plain factor; PEFT says int
        target_modules=list(targets),
        bias="none",
        lora_dropout=0.0,
        base_model_name_or_path=None if base is None else str(base),
    )
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
    for name in layers:
        _start(network.get_submodule(name), generator(seed, "lora", name))
    network.train(network.training)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(network).values()}
    assert len(trained) == 2 * len(layers)
    return layers


def chosen_targets(settings: LoraConfig, card: ModelCard) -> Sequence[str]:
    """Return the ends of names that model.lora.targets gives, itself or as a set of the family; null: the family's own.

    Raise ValueError, naming the nearest, for a set that the family does not have.
    """
    targets, sets = settings.targets, card.lora_target_sets
    if targets is None:
        return card.lora_targets
    if not isinstance(targets, str):
        return targets
    if targets not in sets:
        known = ", ".join(sets) or "none"
        near = difflib.get_close_matches(targets, sets, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"name one of these, or write [{targets}] for ends of names"
        )
        raise ValueError(
            f"model.lora.targets={targets} is no set of layers of {card.name} (its sets: {known}); {hint}"
        )
    return sets[targets]


def has_adapter(network: nn.Module) -> bool:
    """Return whether ``inject_adapter`` was called for this network."""
    return hasattr(network, "peft_config")


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's weights under the names that PEFT's files give them."""
    marks = (f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight")
    return {
        _PREFIX + name.replace(f".{_ADAPTER}.weight", ".weight"): parameter
        for name, parameter in network.named_parameters()
        if name.endswith(marks)
    }


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, from which PEFT builds the adapter on a fresh base."""
    config: Any = network.peft_config
    values = config[_ADAPTER].to_dict() | {"inference_mode": True}
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # the targets are a set
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().contiguous() for name, weight in adapter_parameters(network).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(network: nn.Module, folder: Path) -> None:
    """Put back what ``save_adapter`` wrote, into a network with an adapter of the same targets and rank.

    Raise FileNotFoundError where the file is missing; ValueError where it is damaged or does not fit. Then the
    network is unchanged.
    """
    saved, own = _read(folder / WEIGHTS), adapter_parameters(network)
    if saved.keys() != own.keys():
        raise ValueError(_not_bound(folder / WEIGHTS, list(saved), list(own)))
    for name, weight in own.items():
        if saved[name].shape != weight.shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is {list(saved[name].shape)}, expected {list(weight.shape)}. Use the "
                "model.lora.rank and the base policy that the adapter was trained with"
            )
    for name, weight in own.items():
        weight.copy_(saved[name])


def _not_bound(file: Path, saved: Sequence[str], own: Sequence[str]) -> str:
    """Return why the tensors of a file do not fit an adapter, by their names."""
    missing = [name for name in own if name not in saved]
    unexpected = [name for name in saved if name not in own]
    found = f"{file} holds {len(saved)} tensors, and {len(own) - len(missing)} of this adapter's {len(own)} are among "
    if len(missing) == len(own):
        first = f"it begins with {unexpected[0]}" if unexpected else "it is empty"
        return (
            f"{found}them: {first}, where {own[0]} is expected. Give the folder of an adapter that a run has saved for "
            "this model, in PEFT's names"
        )
    faults = [
        f"{kind} {names[0]}" for kind, names in (("without", missing), ("beside them", unexpected)) if names
    ]
    return f"{found}them, {', '.join(faults)}. Use the model.lora.targets that the adapter was trained with"


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected the adapter that a run has saved")
    return read_files([file])


def _targeted(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the linear layers whose names end in one of ``targets``; ValueError names a target that fits none."""
    if not targets:
        raise ValueError("model.lora.targets is empty: there is nothing to train; name ends of linear layers")
    modules = dict(network.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    layers: list[str] = []
    for target in targets:
        named = [name for name in modules if name == target or name.endswith("." + target)]
        layers += (found := [name for name in named if name in linear])
        others = [name for name in named if name not in linear]
        if not found:
            raise ValueError(
                f"model.lora.targets: {target!r} names no linear layer of {type(network).__name__}; "
                f"{_nearest(target, linear)}"
            )
        if others:
            raise ValueError(
                f"model.lora.targets: {target!r} also names {others[0]}, a {type(modules[others[0]]).__name__}, which "
                f"takes no adapter; write {', '.join(sorted({_tail(name, 2) for name in found}))}"
            )
    return sorted(set(layers))


def _nearest(target: str, linear: Sequence[str]) -> str:
    known = sorted({_tail(name, 2) for name in linear})
    ends = {_tail(name, count) for name in linear for count in (1, 2)}
    near = difflib.get_close_matches(target, sorted(ends), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"its linear layers end in {', '.join(known)}"


def _tail(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])


class _AdapterLinear(nn.Linear):
    """A float32 matrix of an adapter, without a bias, that computes in the type of its input, or in autocast's."""

    def forward(self, x: Tensor) -> Tensor:
        if under_autocast(x):
            return F.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


@torch.no_grad()
def _start(layer: Any, random: torch.Generator) -> None:
    """Give a layer of PEFT's its float32 matrices, on the device of its base."""
    device = layer.base_layer.weight.device
    down, up = (getattr(layer, name)[_ADAPTER].weight.shape for name in ("lora_A", "lora_B"))
    values = torch.empty(down)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=random)
    for name, start in (("lora_A", values.bfloat16().float()), ("lora_B", torch.zeros(up))):
        part = _AdapterLinear(start.shape[1], start.shape[0], bias=False, device="meta")
        part.weight = nn.Parameter(start.to(device))
        getattr(layer, name)[_ADAPTER] = part
    # The matrices follow the type of their input themselves; PEFT's cast would make a float32 copy of it.
    layer.cast_input_dtype_enabled = False
