"""Write an export: load the policy on the CPU in float32, write it in the asked form, load that back and compare."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpo_engine.build import build_model
from vpo_engine.config import Config, MemoryConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.exporting.adapter import (
    DIFFUSERS_FILE,
    Adapter,
    adapter_of,
    merge_adapter,
    save_diffusers,
    save_original,
)
from vpo_engine.exporting.check import (
    attached,
    check_prediction,
    check_same_weights,
    fixed_prediction,
    load_pipeline,
    relative_error,
    sides,
    small_size,
)
from vpo_engine.exporting.folder import ExportMismatchError, add_parts, check_space, written_at
from vpo_engine.exporting.options import ExportOptions, Format
from vpo_engine.foreign_files import file_inside
from vpo_engine.models.diffusers_folder import tokenizer_of
from vpo_engine.models.lora import WEIGHTS, adapter_parameters, load_adapter, save_adapter
from vpo_engine.policy_source import INDEX, RECORD, PolicySource, record_text
from vpo_engine.video_model import VideoModel

POLICY_FOLDER = "transformer"
"""The folder of the policy in that of a diffusers pipeline."""
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """A finished export: what it is, how it is used, and lines that say what was done and compared."""

    what: str
    use: str
    lines: tuple[str, ...]


def write_export(source: PolicySource, out: Path, options: ExportOptions) -> Exported:
    """See ``vpo_engine.export.export``; the options have been checked against the run."""
    source = _beside(source, options.base)
    config, model = source.config, _load(source.config)
    base = _pipeline_folder(source, options, model)
    whole = config.model.lora is None or options.merge
    form = None if whole else _form(options.form, model)
    if source.adapter is not None:
        load_adapter(model.network, source.adapter)
    dtype = _dtype(source, options)
    if whole:
        parts = {} if base is None else _parts(base, config)
        check_space(out, _bytes(model.network, dtype), parts)
        with written_at(out) as folder:
            return _write_whole(source, model, base, parts, folder, out, dtype)
    check_space(out, sum(p.numel() * 4 for p in adapter_parameters(model.network).values()), {})
    assert form is not None
    with written_at(out) as folder:
        return _write_adapter(source, model, base, form, folder, out, dtype)


def _beside(source: PolicySource, base: Path | None) -> PolicySource:
    """Return a source whose parts beside the policy are those of ``base``, unless the run names others; None: as it is.

    The folder that the run started from need not be there any more.
    """
    if base is None:
        return source
    model = source.config.model
    own = {name: getattr(model, name) for name in ("vae", "text_encoder")}
    changed = {name: base for name, path in own.items() if path in (None, source.base)}
    if source.adapter is not None and model.policy is not None and not model.policy.exists():
        changed["policy"] = base
    config = source.config.model_copy(update={"model": model.model_copy(update=changed)})
    return replace(source, config=config)


def _load(config: Config, **changed: Any) -> VideoModel:
    """Load the model of a run on the CPU, with weights and arithmetic in float32, for videos of a small size."""
    plain = {"device": "cpu", "dtype": "float32", "attention": "auto", "fused_ops": "auto"}
    plain |= small_size(config.model.kind) | changed
    settings = config.model.model_copy(update=plain)
    # Previews may be longer than a small video.
    rollout = config.rollout.model_copy(update={"prune": None})
    config = config.model_copy(update={"model": settings, "memory": MemoryConfig(), "rollout": rollout})
    return build_model(config, Processes.start("cpu"), say=lambda line: None)


def _pipeline_folder(source: PolicySource, options: ExportOptions, model: VideoModel) -> Path | None:
    """Return the folder of the diffusers pipeline that the policy belongs to; None if its family has none.

    Raise ValueError if it is not known.
    """
    if not model.card.pipelines:
        if options.base is not None:
            raise ValueError(
                f"--base is for models with a diffusers pipeline, and {model.card.name} has none"
            )
        return None
    named = source.config.model
    places = (options.base, source.base, named.vae, named.text_encoder)
    for folder in filter(None, places):
        if (folder / INDEX).is_file():
            return folder
    raise ValueError(
        f"model.policy={source.base} of the run has no {INDEX}, so the parts beside the policy are not known; give the "
        "folder of the whole published model: --base FOLDER"
    )


def _form(asked: Format | None, model: VideoModel) -> Format:
    """Return the dialect of an adapter; ValueError for one that the model does not have."""
    pipelines = model.card.pipelines
    if asked is None:
        return "diffusers" if pipelines else "peft"
    if asked != "peft" and not pipelines:
        raise ValueError(
            f"--format {asked}: {model.card.name} has no diffusers pipeline that would read it; leave it out for peft"
        )
    if asked == "original" and not any(map(model.original_name, _modules(model.network))):
        raise ValueError(
            f"--format original: {model.card.name} has no other names of its layers; leave it out for diffusers"
        )
    return asked


def _modules(network: nn.Module) -> list[str]:
    return list(adapter_of(network).layers)


def _dtype(source: PolicySource, options: ExportOptions) -> torch.dtype:
    """Return the type of the written weights: by default float32, but for a whole policy that of the checkpoint."""
    if options.dtype is not None:
        found: torch.dtype = getattr(torch, options.dtype)
        return found
    if source.config.model.lora is not None:
        return torch.float32
    assert source.config.model.policy is not None
    stored: Counter[str] = Counter()
    for file in source.config.model.policy.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            stored.update(content.get_slice(name).get_dtype() for name in content.keys())  # noqa: SIM118
    return _STORED.get(stored.most_common(1)[0][0], torch.float32) if stored else torch.float32


def _parts(base: Path, config: Config) -> dict[str, Path]:
    """Return what stands beside the policy in a complete folder: the parts of ``base``, or those that the run names."""
    names = [path.name for path in sorted(base.iterdir()) if path.name != POLICY_FOLDER]
    taken = [name for name in names if (base / name).is_dir() and not name.startswith(".")]
    taken += [path.name for path in (base / INDEX, *base.glob("LICENSE*"))]
    parts = {name: file_inside(base, name, base, "take it out") for name in taken}
    for name in ("vae", "text_encoder"):
        own = getattr(config.model, name)
        if own is not None and own != base:
            parts[name] = own / name if (own / INDEX).is_file() else own
    encoder = parts.get("text_encoder")
    found = None if encoder is None else tokenizer_of(encoder)  # a run reads prompts by it, too
    if found is None or found.parent == base:
        return parts
    if found != encoder:
        return parts | {"tokenizer": found}
    parts.pop("tokenizer", None)
    files = [file for file in sorted(found.iterdir()) if file.is_file()]
    own = [file for file in files if file.suffix not in (".safetensors", ".bin")]
    return parts | {f"tokenizer/{file.name}": file for file in own}


def _bytes(network: nn.Module, dtype: torch.dtype) -> int:
    return sum(tensor.numel() * dtype.itemsize for tensor in (*network.parameters(), *network.buffers()))


# a whole model


def _write_whole(
    source: PolicySource,
    model: VideoModel,
    base: Path | None,
    parts: dict[str, Path],
    folder: Path,
    out: Path,
    dtype: torch.dtype,
) -> Exported:
    network, merged = model.network, source.adapter is not None
    policy = fixed_prediction(model, network)
    if merged:
        merge_adapter(network)
        check_prediction(policy, fixed_prediction(model, network), folder)
    changed = _round(network, dtype, model.card.float32_modules)
    expected = fixed_prediction(model, network)
    lines = [_changed_line(relative_error(policy, expected), dtype if changed else None, merged)]
    _store(network, dtype, model.card.float32_modules)
    model.save_policy(folder if base is None else folder / POLICY_FOLDER)
    _store(network, torch.float32, ())
    (folder / RECORD).write_text(record_text(source, "whole"), encoding="utf-8")
    if base is not None:
        linked, copied = add_parts(folder, parts)
        names = ", ".join(name for name in parts if parts[name].is_dir() and parts[name].parent == base)
        others = "".join(
            f"; {name} is {path}" for name, path in parts.items() if path.is_dir() and path.parent != base
        )
        lines.append(f"{names} are those of {base}{others}: {linked} files were linked and {copied} copied")
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    loaded = _load(source.config, policy=folder, lora=None).network if base is None else None
    loaded = loaded or load_pipeline(folder).transformer
    check_same_weights(weights, loaded.state_dict(), folder)
    error = check_prediction(expected, fixed_prediction(model, loaded), folder)
    lines.append(f"loaded back: all weights are equal, and the prediction differs by {error:.1e} of its size")
    what = "the policy merged with its adapter" if merged else "the policy"
    use = f"python -m vpo_engine.sample {out}"
    if base is not None:
        use = f'DiffusionPipeline.from_pretrained("{out}"), or {use}'
    return Exported(f"{what} ({_named(dtype)})", use, tuple(filter(None, lines)))


@torch.no_grad()
def _round(network: nn.Module, dtype: torch.dtype, kept: tuple[str, ...]) -> bool:
    """Round float32 weights to values of ``dtype``, but for the modules ``kept``; return whether any has changed.

    ValueError if one is too large for the type.
    """
    changed = False
    for name, parameter in network.named_parameters():
        if _stays_float32(name, kept):
            continue
        rounded = parameter.to(dtype).float()
        if not torch.isfinite(rounded).all():
            raise ValueError(f"--dtype {_named(dtype)} cannot hold {name}; give --dtype bfloat16 or float32")
        changed = changed or not torch.equal(rounded, parameter)
        parameter.copy_(rounded)
    return changed


def _store(network: nn.Module, dtype: torch.dtype, kept: tuple[str, ...]) -> None:
    """Hold weights that have been rounded to ``dtype`` in it."""
    for name, parameter in network.named_parameters():
        if not _stays_float32(name, kept):
            parameter.data = parameter.data.to(dtype)


def _stays_float32(name: str, kept: tuple[str, ...]) -> bool:
    return any(f".{module}." in f".{name}." for module in kept)


def _changed_line(error: float, dtype: torch.dtype | None, merged: bool) -> str:
    """Return what merging and rounding have done to the prediction; "" where nothing was done."""
    done = [*(["merging in float32"] if merged else []), *([f"rounding to {_named(dtype)}"] if dtype else [])]
    return f"{' and '.join(done)} has moved the prediction by {error:.1e} of its size" if done else ""


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# an adapter


def _write_adapter(
    source: PolicySource,
    model: VideoModel,
    base: Path | None,
    form: Format,
    folder: Path,
    out: Path,
    dtype: torch.dtype,
) -> Exported:
    network = model.network
    policy = fixed_prediction(model, network)
    effect = relative_error(policy, _without_adapter(model))
    adapter = _round_adapter(network, dtype, scale_in_b=form != "peft")
    expected = fixed_prediction(model, network)
    lines = [f"the adapter moves the prediction by {effect:.1e} of its size"]
    if (rounding := relative_error(policy, expected)) and dtype != torch.float32:
        lines.append(f"rounding to {_named(dtype)} has moved the prediction by {rounding:.1e} of its size")
    if form == "peft":
        save_adapter(network, folder)
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    elif form == "original":
        save_original(adapter, folder, dtype, model.original_name)
    else:
        save_diffusers(adapter, folder, dtype)
    (folder / RECORD).write_text(record_text(source, form), encoding="utf-8")
    loaded = _load_adapted(source.config, base, form, folder)
    check_same_weights(sides(adapter), sides(attached(loaded)), folder)
    error = check_prediction(expected, fixed_prediction(model, loaded), folder)
    lines.append(f"loaded back: all weights are equal, and the prediction differs by {error:.1e} of its size")
    uses: dict[Format, str] = {
        "diffusers": f'pipeline.load_lora_weights("{out}")',
        "original": f'pipeline.load_lora_weights("{out}"), or {out / DIFFUSERS_FILE} in ComfyUI',
        "peft": f'PeftModel.from_pretrained(network, "{out}")',
    }
    use = f"{uses[form]}, or python -m vpo_engine.sample {out} --base {base or 'FOLDER'}"
    count = len(adapter.layers)
    return Exported(
        f"an adapter of rank {adapter.rank} for {count} layers ({_named(dtype)})", use, tuple(lines)
    )


def _without_adapter(model: VideoModel) -> Tensor:
    """Return the prediction of the base alone."""
    layers: list[Any] = [module for module in model.network.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    prediction = fixed_prediction(model, model.network)
    for layer in layers:
        layer.enable_adapters(True)
    return prediction


@torch.no_grad()
def _round_adapter(network: nn.Module, dtype: torch.dtype, scale_in_b: bool) -> Adapter:
    """Give the network's adapter the values that a file in ``dtype`` can hold, and return it with its scale in B.

    scale_in_b: the file holds B with its scale; otherwise B itself.
    """
    for name, weight in adapter_parameters(network).items():
        scale = 1.0
        if scale_in_b and name.endswith(".lora_B.weight"):
            module: Any = network.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            )
            scale = module.scaling["default"]
        weight.copy_((weight * scale).to(dtype).float() / scale)
    exact = adapter_of(network)
    if not scale_in_b:
        return exact
    return Adapter(
        {name: (down.to(dtype).float(), up.to(dtype).float()) for name, (down, up) in exact.layers.items()}
    )


def _load_adapted(config: Config, base: Path | None, form: Format, folder: Path) -> nn.Module:
    """Load the base, and the adapter in ``folder`` on it, as users of its dialect do."""
    network = _load(config, lora=None).network
    try:
        if form == "peft":
            import peft

            peft.PeftModel.from_pretrained(network, str(folder))
            return network
        assert base is not None
        pipeline = load_pipeline(base, transformer=network)
        pipeline.load_lora_weights(str(folder), weight_name=DIFFUSERS_FILE)
        loaded: nn.Module = pipeline.transformer
        return loaded
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportMismatchError(
            f"the adapter does not load ({error}); it is kept in {folder} and must not be used"
        ) from error
