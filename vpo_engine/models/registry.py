"""The registry of model families: the class that ``model.kind`` names, and the options that a run may ask of it."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

from vpo_engine.config import Config
from vpo_engine.config.names import check_kind
from vpo_engine.foreign_files import read_object
from vpo_engine.models.lora import chosen_targets
from vpo_engine.video_model import ModelCard, Option, VideoModel

BUILT_IN = {
    "sprites": "vpo_engine.data.sprites.assets:Sprites",
    "opensora": "vpo_engine.models.opensora.model:OpenSora",
    "cogvideox": "vpo_engine.models.cogvideox.model:CogVideoX",
    "wan": "vpo_engine.models.wan.model:Wan",
    "ltx": "vpo_engine.models.ltx:LTXVideo",
}
"""Kinds that come with the engine, as package.module:Class; a module is imported when its kind is asked for."""

ENTRY_POINTS = "vpo_engine.models"
"""The group of entry points under which an installed package offers kinds of its own."""


def model_family(kind: str) -> type[VideoModel]:
    """Return the class of a family: built in, of an installed package's entry point, or package.module:Class.

    ValueError says what was not found or does not fit, and what to do.
    """
    check_kind(kind, tuple(BUILT_IN), ENTRY_POINTS, "model family", "docs/models.md")
    place = BUILT_IN.get(kind) or (kind if ":" in kind else _offered()[kind])
    found = _load(kind, place)
    _check_class(kind, found)
    return found


def kind_of_pipeline(pipeline: str) -> str | None:
    """Return the built-in kind whose card names a pipeline class of diffusers; None if there is none."""
    return next((kind for kind in BUILT_IN if pipeline in model_family(kind).card.pipelines), None)


def kind_of_folder(folder: Path) -> str:
    """Return the kind of a diffusers folder by the pipeline class that its model_index.json names.

    FileNotFoundError where that file is missing; ValueError for a pipeline of no built-in kind.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has no model_index.json; give the folder of a diffusers pipeline")
    pipeline = read_object(index).get("_class_name")
    if not isinstance(pipeline, str):
        raise ValueError(f"{index} does not name a pipeline class as _class_name; fetch it again")
    kind = kind_of_pipeline(pipeline)
    if kind is None:
        cards = [model_family(known).card for known in BUILT_IN]
        raise ValueError(
            f"{index} names {pipeline}, a pipeline of no known kind of model; known are "
            f"{', '.join(name for card in cards for name in card.pipelines)}"
        )
    return kind


def check_model(config: Config) -> None:
    """Refuse, before any file is read, what building or running the model would; ValueError with the remedy."""
    family, settings = model_family(config.model.kind), config.model
    family.check(settings)
    if settings.lora is not None:
        chosen_targets(settings.lora, family.card)
    for option, (value, neutral) in _asked(config).items():
        if value != neutral and option not in family.card.supports:
            name = option.partition("=")[0]
            raise ValueError(
                f"{name}={_shown(value)} is not supported by model.kind={settings.kind} ({family.card.name}); set "
                f"{name}={_shown(neutral)}"
            )
    if config.card.reward_gradient:
        _check_reward_gradient(config, family.card)
    masters = config.optimizer_memory.weights == "fp32_master"
    if config.distributed.engine == "deepspeed" and masters and family.card.float32_modules:
        raise ValueError(
            f"memory.weights=fp32_master leaves some weights of model.kind={settings.kind} ({family.card.name}) in "
            "float32 beside bfloat16 ones, and DeepSpeed trains weights of one type; set memory.weights=float32, or "
            "distributed.engine=data_parallel"
        )
    frames = config.rollout.preview_frames
    if frames is not None and frames > settings.num_frames:
        raise ValueError(
            f"rollout.prune.frames={frames} is more than a video has with model.num_frames={settings.num_frames}; "
            "lower it, or set rollout.prune.frames=null"
        )


def _check_reward_gradient(config: Config, card: ModelCard) -> None:
    if "method=reward_gradient" not in card.supports:
        raise ValueError(
            f"method={config.method} sends the gradient of the reward through the decoder, which "
            f"model.kind={config.model.kind} ({card.name}) does not support; set method=online_vpo"
        )
    guidance = config.trained_sampling[1]
    if guidance != 1.0 and "rollout.guidance" not in card.supports:
        raise ValueError(
            f"{config.method}.guidance={guidance:g} is not supported by model.kind={config.model.kind} ({card.name}); "
            f"set {config.method}.guidance=1"
        )


def check_loaded(kind: str, model: VideoModel) -> VideoModel:
    """Return the model; ValueError names what its constructor has not set."""
    names = ("network", "latent_shape", "fps", "text_rule", "device", "dtype", "idle_offload")
    missing = [name for name in names if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"model.kind={kind}: a {type(model).__name__} has no {', '.join(missing)} after loading; set them in its "
            "constructor (see docs/models.md)"
        )
    if len(model.latent_shape) != 4:
        raise ValueError(
            f"model.kind={kind}: latent_shape is {model.latent_shape}, expected (channels, frames, rows, columns)"
        )
    return model


def _offered() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def _load(kind: str, place: str) -> Any:
    module_name, _, name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ValueError(
            f"model.kind={kind}: there is no module {error.name}; install its package, or start from the folder that "
            "it lies in by python -m (vpo looks there only with PYTHONPATH=.)"
        ) from error
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if _is_model(value)]
        raise ValueError(
            f"model.kind={kind}: {module_name} has no {name or 'class after the colon'}; its models are "
            f"{', '.join(classes) or 'none'}"
        )
    return getattr(module, name)


def _is_model(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, VideoModel) and not inspect.isabstract(value)


def _check_class(kind: str, found: Any) -> None:
    if not (inspect.isclass(found) and issubclass(found, VideoModel)):
        raise ValueError(
            f"model.kind={kind}: {getattr(found, '__name__', found)} is not a subclass of "
            "vpo_engine.video_model.VideoModel; derive it from vpo_engine.models.base.BaseModel"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if not isinstance(getattr(found, "card", None), ModelCard):
        missing.append("card (a ModelCard)")
    if missing:
        raise ValueError(
            f"model.kind={kind}: {found.__name__} does not define {', '.join(missing)}; docs/models.md says what each "
            "must do"
        )
    unknown = sorted(set(found.card.supports) - set(get_args(Option)))
    if unknown:
        raise ValueError(
            f"model.kind={kind}: its card supports {', '.join(unknown)}, which is no option; options are "
            f"{', '.join(get_args(Option))}"
        )


def _asked(config: Config) -> dict[Option, tuple[Any, Any]]:
    """Return what a run asks of each option, and the value that asks for nothing."""
    model, memory, rollout, first = config.model, config.memory, config.rollout, config.rollout.first_pass
    compiling = rollout.compile
    return {
        "model.height": (model.height, None),
        "model.width": (model.width, None),
        "model.flow_shift": (model.flow_shift, None),
        "model.negative_prompt": (model.negative_prompt, None),
        "model.attention": (model.attention, "auto"),
        "model.fused_ops": (model.fused_ops, "auto"),
        "memory.activation_checkpointing": (memory.activation_checkpointing, "none"),
        "memory.offload_activations": (memory.offload_activations, False),
        "memory.mlp_chunks": (memory.mlp_chunks, 1),
        "memory.decode_frames": (memory.decode_frames, None),
        "memory.decode_strip_height": (memory.decode_strip_height, None),
        "rollout.guidance": (rollout.guidance, 1.0),
        "rollout.guidance_interval": (rollout.guidance_interval or first.guidance_interval, None),
        "rollout.cache": (rollout.cache or first.cache, None),
        "rollout.compile=blocks": (compiling if compiling == "blocks" else "none", "none"),
        "rollout.compile=graphs": (compiling if compiling == "graphs" else "none", "none"),
        "rollout.prune.frames": (rollout.preview_frames, None),
        "distributed.sequence_parallel": (config.distributed.sequence_parallel, 1),
        "processes.split_guidance": (config.processes.split_guidance, False),
    }


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
