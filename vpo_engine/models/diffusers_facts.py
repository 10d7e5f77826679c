"""The facts by which families of diffusers differ, and the settings that one model is built by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vpo_engine.config import ModelConfig
from vpo_engine.models.diffusers_network import TextLayers
from vpo_engine.models.diffusers_sequence import TokenInputs
from vpo_engine.video_model import Option, Padding

OPTIONS: frozenset[Option] = frozenset(
    {
        "model.height",
        "model.width",
        "model.flow_shift",
        "model.negative_prompt",
        "model.attention",
        "memory.activation_checkpointing",
        "memory.offload_activations",
        "memory.mlp_chunks",
        "rollout.guidance",
        "rollout.guidance_interval",
        "rollout.cache",
        "rollout.compile=blocks",
        "rollout.compile=graphs",
        "method=reward_gradient",
        "distributed.sequence_parallel",
        "processes.split_guidance",
    }
)
"""The options that the base class supports for every family; a family leaves out those that mean nothing to it."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The facts about a family's folders and networks; see docs/models.md.

    transformer, vae: names of classes of diffusers. text_encoder: of a class of transformers. published: the contents
    of the published config files, {"transformer", "vae", "text_encoder", "scheduler": settings}, by which the planner
    goes where there is no folder. size: height and width in pixels that the published model was made for.
    latent_channels: the key of the VAE's config.json that says how many channels latents have. needed: settings of
    transformer and VAE that may not be null, although their classes take null. layout: the order in
    which the transformer takes the dimensions of latents [B, C, T, H, W]. text_layers: the layers that see only the
    text.
    padding: see ``TextRule``. encoder_mask: whether the text encoder is given the mask of a prompt's tokens.
    tokens: the inputs of blocks that can be divided among processes; None: they cannot.
    negative_prompt: of guidance, unless model.negative_prompt is given. negative_first: the negative prompt is the
    first half of a guided batch.
    """

    transformer: str
    vae: str
    text_encoder: str
    published: Mapping[str, Mapping[str, Any]]
    size: tuple[int, int]
    latent_channels: str = "latent_channels"
    needed: tuple[str, ...] = ()
    layout: tuple[int, ...] = (0, 1, 2, 3, 4)
    text_layers: tuple[TextLayers, ...] = ()
    padding: Padding = "attended"
    encoder_mask: bool = False
    negative_prompt: str = ""
    negative_first: bool = True
    tokens: TokenInputs | None = None


@dataclass(frozen=True)
class Sources:
    """The files that the settings of a model's parts are from, as errors name them."""

    transformer: str = "config.json of the transformer"
    vae: str = "config.json of the VAE"
    scheduler: str = "scheduler_config.json of the pipeline"
    text_encoder: str = "config.json of the text encoder"


@dataclass(frozen=True)
class Setup:
    """The settings that one model is built by: those in its parts' files, and the size of its videos.

    flow_shift: model.flow_shift. negative_prompt: of guidance. fps: frames a second.
    sources: the files.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    height: int
    width: int
    num_frames: int
    fps: int
    negative_prompt: str
    flow_shift: float | None = None
    text_encoder: Mapping[str, Any] = field(default_factory=dict)
    sources: Sources = Sources()


_ELSEWHERE = ("resolution", "aspect", "aesthetic_score")
"""Settings of other families. They have no effect here, so other values than the defaults are refused."""


def refuse_settings_of_others(settings: ModelConfig, model: str) -> None:
    """Raise ValueError for a setting that no family of diffusers has. ``model``: the name in the message."""
    for name in _ELSEWHERE:
        value, default = getattr(settings, name), ModelConfig.model_fields[name].default
        if value is not None and value != default:
            raise ValueError(
                f"model.{name}={value} has no effect on model.kind={settings.kind} ({model}); leave it "
                f"out{'' if name == 'aesthetic_score' else ', and set model.height and model.width'}"
            )


def check_parts_fit(pairs: Iterable[tuple[str, str, int, int]]) -> None:
    """Raise ValueError where a part gives another number of something than the transformer takes.

    pairs: (what is counted, the part, the number that it gives, the number that the transformer takes).
    """
    for what, part, given, taken in pairs:
        if given != taken:
            raise ValueError(
                f"the {part} gives {given} {what} and the transformer takes {taken}; give parts of one pipeline"
            )
