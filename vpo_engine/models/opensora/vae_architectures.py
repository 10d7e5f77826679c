"""The architectures that a published config.json of the VAE names, or describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from vpo_engine.models.opensora.vae_temporal import TemporalConfig

Architecture = TypeVar("Architecture")

SPATIAL_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers": {
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.13025,
    }
}
"""AutoencoderKL arguments by the hub id that a published config names. Never downloaded."""

TEMPORAL_ARCHITECTURES: dict[str, TemporalConfig] = {"VAE_Temporal_SD": TemporalConfig()}


@dataclass(frozen=True)
class _SpatialPart:
    """Settings of ``vae_2d`` in a published config."""

    from_pretrained: str | None = None
    micro_batch_size: int | None = 4


@dataclass(frozen=True)
class _TemporalPart:
    """Settings of ``vae_temporal`` in a published config."""

    type: str | None = None


@dataclass(frozen=True)
class PublishedParts:
    """Settings of a published config that name architectures."""

    vae_2d: _SpatialPart
    vae_temporal: _TemporalPart


def spatial_architecture(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of AutoencoderKL for the spatial half. ValueError for a name that is not known."""
    if "spatial_config" in config:
        return config["spatial_config"]
    name = config.get("vae_2d", {}).get("from_pretrained")
    remedy = "give AutoencoderKL arguments as 'spatial_config'"
    return _named("vae_2d.from_pretrained", name, SPATIAL_ARCHITECTURES, remedy)


def temporal_architecture(config: Mapping[str, Any]) -> TemporalConfig:
    """Return the sizes of the temporal half. ValueError for unknown keys, and for a name that is not known."""
    if "temporal_config" in config:
        known = [field.name for field in fields(TemporalConfig)]
        unknown = sorted(set(config["temporal_config"]) - set(known))
        if unknown:
            raise ValueError(f"temporal_config has unknown keys {unknown}; known: {', '.join(known)}")
        return TemporalConfig(**config["temporal_config"])
    name = config.get("vae_temporal", {}).get("type")
    return _named("vae_temporal.type", name, TEMPORAL_ARCHITECTURES, "give its sizes as 'temporal_config'")


def _named(key: str, name: str | None, known: Mapping[str, Architecture], remedy: str) -> Architecture:
    if name is None or name not in known:
        raise ValueError(
            f"{key} is {name!r}, an architecture not known here (known: {', '.join(known)}); {remedy}"
        )
    return known[name]
