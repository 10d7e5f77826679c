"""Read the folders of diffusers pipelines: find their parts, check that they are what they should be, load weights.

A pipeline's folder holds model_index.json and a folder for each part: transformer, vae, text_encoder, tokenizer,
scheduler. Classes are those of diffusers and transformers; weights are read as ``vpo_engine.weights`` reads them, and
nothing here reaches the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vpo_engine import foreign_settings, weights
from vpo_engine.config import ModelConfig
from vpo_engine.foreign_files import read_settings
from vpo_engine.foreign_settings import check_settings, described_by
from vpo_engine.model_loading import ReadConfig
from vpo_engine.models.registry import kind_of_pipeline

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_OTHER_WEIGHTS = ("diffusion_pytorch_model.bin",)
_LIBRARIES = ("diffusers", "transformers")
"""The packages whose classes a pipeline may name."""
_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
AGAIN = "fetch the folder again"
_LARGEST_VECTOR = 1 << 20
_TABLES = ("shared.weight", "encoder.embed_tokens.weight")
"""The names of the token table of a text encoder, which checkpoints store once or twice."""


Read = dict[str, tuple[str, Mapping[str, Any]]]
"""{part: (the file that its settings are from, as errors name it; the settings)}."""


@dataclass(frozen=True)
class Folder:
    """The folders of a model's parts. ``scheduler`` is a file."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    scheduler: Path

    def read(self) -> Read:
        """Return what the files say. Raise ValueError as ``read_config`` does."""
        files = {
            "transformer": self.transformer / CONFIG,
            "vae": self.vae / CONFIG,
            "scheduler": self.scheduler,
            "text_encoder": self.text_encoder / CONFIG,
        }
        return {part: (str(file), read_config(file)) for part, file in files.items()}


def find_parts(
    policy: Path, vae: Path | None, text_encoder: Path | None, pipelines: tuple[str, ...], kind: str
) -> Folder:
    """Return the folders of all parts, each of which is there, with its weight files.

    policy: a pipeline's folder, or a transformer's alone. vae, text_encoder: folders of these parts or of pipelines
    that hold them; None for those of ``policy``. Raise FileNotFoundError for what is missing, ValueError for a pipeline
    of another family; ``pipelines`` are those of this one, whose kind is ``kind``.
    """
    if not policy.is_dir():
        raise FileNotFoundError(
            f"model.policy={policy} is no folder; give the folder of a diffusers pipeline, with {INDEX} and its parts"
        )
    whole = (policy / INDEX).is_file()
    if whole:
        _check_pipeline(policy, pipelines, kind)
    elif not (policy / CONFIG).is_file():
        raise FileNotFoundError(_neither(policy))
    missing = [name for name, path in (("vae", vae), ("text_encoder", text_encoder)) if path is None]
    if missing and not whole:
        raise ValueError(
            f"model.policy={policy} is the folder of a transformer alone, so model.{' and model.'.join(missing)} must "
            "be given too: the folder of the pipeline that it was trained from"
        )
    transformer = policy / "transformer" if whole else policy
    found_vae = _part(vae or policy, "vae")
    found_text = _part(text_encoder or policy, "text_encoder")
    around = (policy, found_vae.parent, found_text.parent)
    for name, folder in (("transformer", transformer), ("vae", found_vae), ("text_encoder", found_text)):
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG}; expected the folder of a {name}")
    for folder in (transformer, found_vae):
        part_files(folder)
    _encoder_files(found_text)
    return Folder(
        transformer=transformer,
        vae=found_vae,
        text_encoder=found_text,
        tokenizer=_tokenizer(found_text),
        scheduler=_scheduler([folder / "scheduler" / SCHEDULER for folder in around]),
    )


def _part(folder: Path, name: str) -> Path:
    """Return the folder of a part: inside of a pipeline's folder, or the folder itself."""
    return folder / name if (folder / INDEX).is_file() else folder


def tokenizer_of(text_encoder: Path) -> Path | None:
    """Return the folder of a text encoder's tokenizer: beside it, or its own; None where neither has one."""
    places = (text_encoder.parent / "tokenizer", text_encoder)
    return next((place for place in places if any((place / name).is_file() for name in _TOKENIZERS)), None)


def _tokenizer(text_encoder: Path) -> Path:
    if (found := tokenizer_of(text_encoder)) is not None:
        return found
    raise FileNotFoundError(
        f"there is no tokenizer for {text_encoder}: neither {text_encoder.parent / 'tokenizer'} nor {text_encoder} has "
        f"{' or '.join(_TOKENIZERS)}; fetch the folder tokenizer of the pipeline"
    )


def _scheduler(places: list[Path]) -> Path:
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise FileNotFoundError(
        f"there is no {SCHEDULER} that says the noise schedule: looked for {looked}; set model.vae to the folder of "
        "the whole pipeline"
    )


def _check_pipeline(folder: Path, pipelines: tuple[str, ...], kind: str) -> None:
    found = pipeline_index(folder)["_class_name"]
    if found in pipelines:
        return
    other = kind_of_pipeline(str(found))
    remedy = f"set model.kind={other}" if other else f"give a folder of {' or '.join(pipelines)}"
    raise ValueError(f"model.policy={folder} is a {found}, not a model of model.kind={kind}; {remedy}")


def _neither(folder: Path) -> str:
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    inside = sorted((*folder.glob("*/policy"), *folder.glob(f"*/{INDEX}"), *folder.glob("policy")))
    meant = f"; did you mean {inside[-1].parent if inside[-1].is_file() else inside[-1]}?" if inside else ""
    return (
        f"model.policy={folder} holds neither {INDEX} (the folder of a pipeline) nor {CONFIG} (that of a transformer); "
        f"found {held}{meant}"
    )


def read_config(file: Path) -> dict[str, Any]:
    """Return the settings in a JSON file. Raise ValueError as ``foreign_files.read_settings`` does."""
    return read_settings(file)


def read_planned(
    settings: ModelConfig, read: ReadConfig, name: str, published: Mapping[str, Mapping[str, Any]]
) -> Read:
    """Return the settings of the parts of a model that is planned, whose folders may be elsewhere.

    read: finds the file of a part, or takes the published settings. name, published: of the published model.
    """
    found: Read = {}
    for part in ("transformer", "vae", "text_encoder"):
        given: Path | None = getattr(settings, part, None) or settings.policy
        if given is not None and (given / part).is_dir():
            given = given / part
        config = read(given, published[part], f"{name}'s {part}")
        found[part] = (f"{CONFIG} of {name}'s {part}" if given is None else str(given / CONFIG), config)
    here = None if settings.policy is None else settings.policy / "scheduler" / SCHEDULER
    if here is not None and here.is_file():
        return found | {"scheduler": (str(here), read_config(here))}
    return found | {"scheduler": (f"{SCHEDULER} of {name}", published["scheduler"])}


def pipeline_index(folder: Path) -> dict[str, Any]:
    """Return the content of a pipeline's model_index.json.

    Raise ValueError for a part that is of no class of diffusers or transformers: to load it would run other code.
    """
    file = folder / INDEX
    index = read_config(file)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{file} does not name a pipeline class as _class_name; fetch it again")
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        known = len(value) == 2 and value[0] in _LIBRARIES and isinstance(value[1], str)
        if not known or not value[1].isidentifier():
            raise ValueError(
                f"{file} says that {name} is {value}, expected a class of {' or '.join(_LIBRARIES)}; no other code is "
                "run because a file names it: fetch the folder of a published pipeline"
            )
    return index


def part_config(folder: Path, name: str, needed: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of a part that is of the diffusers class ``name``. needed, and errors: see ``completed``."""
    return completed(name, folder / CONFIG, read_config(folder / CONFIG), needed)


def completed(
    name: str,
    where: Path | str,
    config: Mapping[str, Any],
    needed: Collection[str] = (),
) -> dict[str, Any]:
    """Return the settings of a part with the defaults of its diffusers class for those that its file leaves out.

    where: the file that they are from. needed: those that may not be null. Raise ValueError for settings of another
    class, and for values that the class cannot take.
    """
    found = config.get("_class_name", name)
    if found != name:
        raise ValueError(f"{where} is of a {found}, expected a {name}; give the folder of such a part")
    kind = diffusers_class(name)
    check_settings(config, kind, where, AGAIN, needed=needed)
    return foreign_settings.completed(config, kind)


def diffusers_class(name: str) -> Any:
    """Return a class of diffusers."""
    import diffusers

    return getattr(diffusers, name)


def build_part(
    name: str, config: Mapping[str, Any], where: Path | str = "a part of model.policy", **changes: Any
) -> nn.Module:
    """Build a part of a diffusers class without weights: its parameters and stored buffers are on the meta device.

    Buffers that are computed and not stored (position tables, frequencies of rope) are computed, on the CPU.
    changes: settings that are taken in place of the config's while it is built; its own config keeps the latter.
    ValueError, which names ``where`` the settings are from, if it cannot be built by them.
    """
    with described_by(where, f"{name} that can be built", AGAIN), _EmptyOnMeta():
        module: Any = diffusers_class(name).from_config({**config, **changes})
    module.register_to_config(**{key: config[key] for key in changes})
    stored = set(module.state_dict())
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for key, tensor in held.items():
                if tensor is not None and f"{prefix}.{key}".removeprefix(".") in stored:
                    empty = tensor.to("meta")
                    held[key] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    built: nn.Module = module.eval()
    return built


def load_part(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    mapped: Callable[[nn.Module], Collection[str]] = lambda module: (),
    **changes: Any,
) -> nn.Module:
    """Load a part of a diffusers class from its folder, in ``dtype``, on the CPU. changes: see ``build_part``.

    mapped: names the weights of the part that are not copied from their files (see ``weights.load_strict``).
    Raise FileNotFoundError for missing weight files, ValueError for a folder of another class and for weights that are
    damaged or do not fit.
    """
    module = build_part(name, part_config(folder, name), folder / CONFIG, **changes)
    load_weights(module, folder, name, dtype, mapped(module))
    return module


def load_weights(
    module: nn.Module,
    folder: Path,
    name: str,
    dtype: torch.dtype | None = None,
    mapped: Collection[str] = (),
) -> None:
    """Copy the weights of a part's folder into a module, strictly; see ``weights.load_strict``."""
    weights.load_strict(
        module,
        weights.read_files(part_files(folder)),
        where=folder,
        model=f"a {name} as its {CONFIG} says",
        remedy="fetch the folder again, or give the one that belongs to this model",
        dtype=dtype,
        mapped=mapped,
    )


def part_files(folder: Path) -> list[Path]:
    """Return the weight files of a part in diffusers' layout. FileNotFoundError names what is missing."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        return weights.shard_files(index)
    for name in (WEIGHTS, *_OTHER_WEIGHTS):
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {index.name}; fetch the folder again")


def load_text_encoder(
    build: Callable[[], nn.Module], folder: Path, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Load the text encoder that ``build`` makes; its folder is laid out as transformers does.

    The token table may be stored once or twice, and is one tensor afterwards. Raise FileNotFoundError for missing
    weight files, ValueError for weights that are damaged or do not fit, and for a table of zeros: such an encoder
    gives the same embedding for every prompt.
    """
    with torch.device("meta"):
        model = build()
    state = weights.read_files(_encoder_files(folder))
    tables = [name for name in _TABLES if name in state]
    if len(tables) == 2 and not torch.equal(*(state[name] for name in tables)):
        raise ValueError(
            f"{folder} holds two different token tables, {' and '.join(tables)}; fetch the folder again"
        )
    for name in tables:
        if not bool(state[name].any()):
            raise ValueError(
                f"{folder}: the token table {name} holds zeros only, so every prompt would mean the same; fetch the "
                "folder again"
            )
    kept = {name: tensor for name, tensor in state.items() if name not in tables[1:]}
    complete = kept | {name: state[tables[0]] for name in _TABLES if tables}
    weights.check_weights(
        model,
        complete,
        where=folder,
        model=f"a {type(model).__name__} as its {CONFIG} says",
        remedy="fetch the folder again",
    )
    moved = weights.move_in_order(kept, dtype, device)
    moved |= {name: moved[tables[0]] for name in _TABLES if tables}
    model.load_state_dict(moved, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _encoder_files(folder: Path) -> list[Path]:
    files = weights.weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(weights.WHOLE)}; fetch the folder again")
    return files


class _EmptyOnMeta(TorchFunctionMode):
    """A context in which tensors that are only allocated, as the parameters of layers are, are on the meta device.

    So are tensors of ones or zeros that are larger than any vector of a norm: a config may ask for more than it has.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in (torch.ones, torch.zeros):
            sketch: Tensor = func(*args, **{**kwargs, "device": "meta"})
            if sketch.numel() > _LARGEST_VECTOR:
                return sketch
        return func(*args, **kwargs)
