"""The sizes of mPLUG-Owl2, and the published config.json that they are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_engine.foreign_settings import check_settings


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"the configuration of mPLUG-Owl2 lacks {name!r}; take the published config.json")
    return fields[name]


@dataclass(frozen=True, kw_only=True)
class _PublishedStack:
    """What is read of the published config.json; here of a stack of layers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    rms_norm_eps: float


@dataclass(frozen=True, kw_only=True)
class _PublishedVision(_PublishedStack):
    image_size: int
    patch_size: int


@dataclass(frozen=True, kw_only=True)
class _PublishedAbstractor(_PublishedStack):
    num_learnable_queries: int


@dataclass(frozen=True, kw_only=True)
class _PublishedVisual:
    visual_model: _PublishedVision
    visual_abstractor: _PublishedAbstractor


@dataclass(frozen=True, kw_only=True)
class _Published(_PublishedStack):
    visual_config: _PublishedVisual
    vocab_size: int
    bos_token_id: int
    rope_theta: float


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer layers."""

    width: int
    hidden: int
    depth: int
    heads: int
    eps: float

    @staticmethod
    def from_dict(fields: Mapping[str, Any], eps: str) -> StackConfig:
        """``eps``: the name of the field that holds the norms' epsilon."""
        config = StackConfig(
            width=_field(fields, "hidden_size"),
            hidden=_field(fields, "intermediate_size"),
            depth=_field(fields, "num_hidden_layers"),
            heads=_field(fields, "num_attention_heads"),
            eps=_field(fields, eps),
        )
        if config.width % config.heads:
            raise ValueError(
                f"hidden_size {config.width} is no multiple of num_attention_heads {config.heads}; "
                "take the published config.json"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class MplugOwl2Config:
    """The sizes of the parts. queries: vectors of a frame without its end; rope_theta: base of the rotary embedding."""

    vision: StackConfig
    abstractor: StackConfig
    language: StackConfig
    image_size: int
    patch_size: int
    queries: int
    vocabulary: int
    rope_theta: float

    @property
    def positions(self) -> int:
        """Return the number of vectors of an image: one for each patch, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @staticmethod
    def from_dict(fields: Mapping[str, Any], where: Path | str = "config.json") -> MplugOwl2Config:
        """Read the published config.json, the file ``where``.

        Raise ValueError for another model, for values that it cannot have, and for an option that is not built here.
        """
        if fields.get("model_type") != "mplug_owl2":
            raise ValueError(
                f"model_type is {fields.get('model_type')!r}, expected 'mplug_owl2': the model is another one"
            )
        if fields.get("rope_scaling") is not None:
            raise ValueError(
                f"rope_scaling is {fields['rope_scaling']}, expected none; take q-future/one-align"
            )
        check_settings(fields, _Published, where, "take the published config.json")
        visual = _field(fields, "visual_config")
        vision, abstractor = _field(visual, "visual_model"), _field(visual, "visual_abstractor")
        return MplugOwl2Config(
            vision=StackConfig.from_dict(vision, "layer_norm_eps"),
            abstractor=StackConfig.from_dict(abstractor, "layer_norm_eps"),
            language=StackConfig.from_dict(fields, "rms_norm_eps"),
            image_size=_field(vision, "image_size"),
            patch_size=_field(vision, "patch_size"),
            queries=_field(abstractor, "num_learnable_queries"),
            vocabulary=_field(fields, "vocab_size"),
            rope_theta=fields.get("rope_theta", 10000.0),
        )
