"""The Open-Sora 1.2 VAE: an image autoencoder frame by frame, then a causal temporal one over its latents.

Numbers, chunking and noise order follow ``opensora/models/vae/vae.py`` of Open-Sora v1.2.0; state-dict keys
are the published ones (``scale``, ``shift``, ``spatial_vae.module.*``, ``temporal_vae.*``). Gradients flow through all
of it; callers that want none use ``torch.no_grad()``.

Shape letters: B clips, F frames of H x W pixels, C latent channels, T latent frames of h x w.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vpo_engine.foreign_settings import check_settings, described_by
from vpo_engine.models.opensora.checkpoint import config_file, load_config, load_strict
from vpo_engine.models.opensora.stdit3_config import CONFIG
from vpo_engine.models.opensora.vae_architectures import (
    PublishedParts,
    spatial_architecture,
    temporal_architecture,
)
from vpo_engine.models.opensora.vae_strips import StripDecoder
from vpo_engine.models.opensora.vae_temporal import Posterior, TemporalConfig, TemporalVAE

_AGAIN = "download it again"
SPATIAL_SCALING = 0.18215
"""The published factor, in force although the spatial part's own config says 0.13025."""


class SpatialVAE(nn.Module):
    """diffusers' AutoencoderKL over frames, ``micro_batch_size`` frames at a time (None: all at once)."""

    def __init__(self, config: Mapping[str, Any], micro_batch_size: int | None):
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"micro_batch_size is {micro_batch_size}; it counts frames: 1 or more, or None for all"
            )
        self.module = AutoencoderKL(**config)
        self.micro_batch_size = micro_batch_size
        self.latent_channels = int(self.module.config.latent_channels)
        self.factor = 2 ** (len(self.module.config.block_out_channels) - 1)
        self.strips = StripDecoder()

    def micro_batches(self, frames: int) -> list[int]:
        """Return the sizes of the micro-batches that ``frames`` frames are cut into."""
        size = self.micro_batch_size or frames
        return [min(size, frames - start) for start in range(0, frames, size)]

    def posterior(self, video: Tensor) -> Posterior:
        """Encode [B, 3, F, H, W] to a posterior over [B * F, C, h, w], frames of a clip next to each other."""
        frames = video.transpose(1, 2).flatten(0, 1)
        parts = [
            self.module.encode(part).latent_dist for part in frames.split(self.micro_batches(len(frames)))
        ]
        return Posterior(_cat([part.mean for part in parts]), _cat([part.logvar for part in parts]))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode [B, C, F, h, w] to [B, 3, F, H, W]."""
        pixels = _cat(list(self.decode_parts(latents)))
        return pixels.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)

    def decode_parts(
        self, latents: Tensor, size: int | None = None, rows: int | None = None
    ) -> Iterator[Tensor]:
        """Decode [B, C, F, h, w] to frames [n, 3, H, W], one micro-batch (of ``size``, if given) after the other.

        With ``rows``, so many rows of every map are computed at a time: the same up to rounding.
        """
        frames = latents.transpose(1, 2).flatten(0, 1)
        for part in frames.split(size or self.micro_batches(len(frames))):
            if rows is None:
                yield self.module.decode(part).sample
            else:
                convolution = self.module.post_quant_conv
                z = part if convolution is None else convolution(part)
                yield self.strips(self.module.decoder, z, rows)


class OpenSoraVAE(nn.Module):
    """Video [B, 3, F, H, W] in [-1, 1] <-> normalised latents [B, C, T, h, w].

    Time is cut into chunks of ``micro_frame_size`` frames that know nothing of each other.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        spatial_config: Mapping[str, Any],
        temporal_config: TemporalConfig,
        *,
        scale: Sequence[float],
        shift: Sequence[float],
        micro_frame_size: int = 17,
        micro_batch_size: int | None = 4,
        spatial_scaling: float = SPATIAL_SCALING,
    ):
        super().__init__()
        self.spatial_vae = SpatialVAE(spatial_config, micro_batch_size)
        self.latent_channels = temporal_config.embed_dim
        if self.spatial_vae.latent_channels != temporal_config.in_out_channels:
            raise ValueError(
                f"the spatial part makes {self.spatial_vae.latent_channels} latent channels and the temporal "
                f"part takes in_out_channels={temporal_config.in_out_channels}; they must be equal"
            )
        self.temporal_vae = TemporalVAE(temporal_config)
        for name, values in (("scale", scale), ("shift", shift)):
            if len(values) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(values)} values for embed_dim={self.latent_channels} latent channels; "
                    "give one per channel"
                )
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1))
        if micro_frame_size < 1:
            raise ValueError(f"micro_frame_size is {micro_frame_size}; a chunk needs 1 frame or more")
        self.micro_frame_size = micro_frame_size
        self.spatial_scaling = spatial_scaling
        self.config: dict[str, Any] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: Path | str = CONFIG) -> OpenSoraVAE:
        """Build from a published ``config.json``, or from one with explicit architectures.

        Read: ``scale``, ``shift``, ``micro_frame_size`` (17), ``vae_2d.micro_batch_size`` or
        ``micro_batch_size`` (4; None: all frames at once), ``spatial_scaling`` (0.18215), and the
        architectures: ``spatial_config`` (AutoencoderKL arguments) or the hub id in
        ``vae_2d.from_pretrained``; ``temporal_config`` or the name in ``vae_temporal.type``. ``where``: the file
        that it is from. Raise ValueError for values that the VAE cannot have.
        """
        missing = [key for key in ("scale", "shift") if key not in config]
        if missing:
            raise ValueError(f"the VAE config lacks {missing}; is it the config.json of an Open-Sora VAE?")
        for kind in (cls, PublishedParts):
            check_settings(config, kind, where, _AGAIN)
        vae_2d = config.get("vae_2d", {})
        spatial = spatial_architecture(config)
        check_settings(spatial, AutoencoderKL, f"{where}: spatial_config", _AGAIN)
        with described_by(where, "VAE that can be built", _AGAIN):
            vae = cls(
                spatial,
                temporal_architecture(config),
                scale=config["scale"],
                shift=config["shift"],
                micro_frame_size=config.get("micro_frame_size", 17),
                micro_batch_size=config.get("micro_batch_size", vae_2d.get("micro_batch_size", 4)),
                spatial_scaling=config.get("spatial_scaling", SPATIAL_SCALING),
            )
        vae.config = copy.deepcopy(dict(config))
        return vae

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> OpenSoraVAE:
        """Load a local copy of hpcai-tech/OpenSora-VAE-v1.2: config.json, model.safetensors; its dtype is kept."""
        config = load_config(folder)
        with torch.device("meta"):
            vae = cls.from_config(config, config_file(folder))
        load_strict(vae, folder)
        return vae

    @property
    def spatial_factor(self) -> int:
        """Return the pixels per latent pixel along one axis: 8 as published."""
        return self.spatial_vae.factor

    @property
    def temporal_factor(self) -> int:
        """Return the frames per latent frame within a chunk: 4 as published."""
        return self.temporal_vae.config.factor

    def chunks(self, num_frames: int) -> list[int]:
        """Return the frame counts of the chunks that ``num_frames`` frames are cut into."""
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; a video needs 1 frame or more")
        full, rest = divmod(num_frames, self.micro_frame_size)
        return [self.micro_frame_size] * full + ([rest] if rest else [])

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, h, w) of a clip; pixels beyond the last full latent cell are lost."""
        frames = sum(self.temporal_vae.latent_frames(chunk) for chunk in self.chunks(num_frames))
        if min(height, width) < self.spatial_factor:
            raise ValueError(
                f"{height} x {width} pixels are less than one latent cell; "
                f"height and width must be at least {self.spatial_factor}"
            )
        return frames, height // self.spatial_factor, width // self.spatial_factor

    def encode(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        sample: bool = True,
        noise: Iterator[Tensor] | None = None,
    ) -> Tensor:
        """Encode video [B, 3, F, H, W] in [-1, 1] to normalised latents [B, C, T, h, w].

        Both posteriors are sampled, as published; ``sample=False`` takes both means. Noise is drawn first for
        the spatial part, once per micro-batch of frames, then once per chunk of the temporal part; ``noise``
        gives those tensors, in that order, in place of draws.
        """
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"the video has shape {tuple(x.shape)}; expected [B, 3, F, H, W]")
        self.latent_size(*x.shape[2:])
        draw = _NoiseSource(generator, noise) if sample else None
        posterior = self.spatial_vae.posterior(x.to(self.scale.dtype))
        frames = posterior.mean
        if draw is not None:
            micro_batches = posterior.mean.split(self.spatial_vae.micro_batches(len(frames)))
            frames = posterior.sample(_cat([draw(part) for part in micro_batches]))
        x_z = frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) * self.spatial_scaling
        chunks = [self.temporal_vae.posterior(part) for part in x_z.split(self.chunks(x.shape[2]), dim=2)]
        z = [part.mean if draw is None else part.sample(draw(part.mean)) for part in chunks]
        return (_cat(z, dim=2) - self.shift) / self.scale

    def spatial_posterior(self, x: Tensor) -> Posterior:
        """Encode video [B, 3, F, H, W] to the posterior over unscaled spatial latents, [B, C, F, h, w]."""
        posterior = self.spatial_vae.posterior(x.to(self.scale.dtype))
        clips = (x.shape[0], x.shape[2])
        return Posterior(
            posterior.mean.unflatten(0, clips).transpose(1, 2),
            posterior.logvar.unflatten(0, clips).transpose(1, 2),
        )

    def temporal_posterior(self, x_z: Tensor) -> Posterior:
        """Encode scaled spatial latents [B, C, F, h, w] to the posterior over raw latents, [B, C, T, h, w]."""
        chunks = [self.temporal_vae.posterior(part) for part in x_z.split(self.chunks(x_z.shape[2]), dim=2)]
        return Posterior(
            _cat([part.mean for part in chunks], dim=2), _cat([part.logvar for part in chunks], dim=2)
        )

    def decode_temporal(self, z: Tensor, num_frames: int) -> Tensor:
        """Decode raw (not normalised) latents [B, C, T, h, w] to scaled spatial latents [B, C, num_frames, h, w]."""
        frames = self.chunks(num_frames)
        parts = z.split(self._latents_of(z, frames), dim=2)
        return _cat(
            [self.temporal_vae.decode(part, chunk) for part, chunk in zip(parts, frames, strict=True)], dim=2
        )

    def decode_spatial(self, x_z: Tensor) -> Tensor:
        """Decode scaled spatial latents [B, C, F, h, w] to video [B, 3, F, H, W]."""
        return self.spatial_vae.decode(x_z / self.spatial_scaling)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Decode normalised latents [B, C, T, h, w] to video [B, 3, num_frames, H, W], near [-1, 1], not clamped."""
        return self.decode_spatial(self.decode_temporal(self._raw(z), num_frames))

    def decode_uint8(
        self,
        z: Tensor,
        num_frames: int,
        frames_at_once: int | None = None,
        rows_at_once: int | None = None,
    ) -> Tensor:
        """Compute ``to_uint8(decode(z, num_frames))``, bit for bit, with one micro-batch in floating point at a time.

        ``frames_at_once`` makes the micro-batches of the spatial part that large and takes the temporal part clip by
        clip: the same up to the rounding of other batch shapes. ``rows_at_once`` lets the spatial part go over so many
        rows of its maps at a time: the same up to rounding. uint8 [B, num_frames, H, W, 3].
        """
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once is {rows_at_once}; it counts rows: 1 or more, or None for all")
        if frames_at_once is not None and frames_at_once < 1:
            raise ValueError(
                f"frames_at_once is {frames_at_once}; it counts frames: 1 or more, or None as published"
            )
        self._latents_of(z, self.chunks(num_frames))
        height, width = (self.spatial_factor * side for side in z.shape[3:])
        video = torch.empty(len(z), num_frames, height, width, 3, dtype=torch.uint8, device=z.device)
        clips = len(z) if frames_at_once is None else 1
        for latents, clip in zip(z.split(clips), video.split(clips), strict=True):
            x_z = self.decode_temporal(self._raw(latents), num_frames) / self.spatial_scaling
            frames, done = clip.flatten(0, 1), 0
            for pixels in self.spatial_vae.decode_parts(x_z, frames_at_once, rows_at_once):
                frames[done : done + len(pixels)] = to_uint8(pixels.unsqueeze(2)).squeeze(1)
                done += len(pixels)
        return video

    def _latents_of(self, z: Tensor, chunks: Sequence[int]) -> list[int]:
        """Return the latent frames of each chunk; ValueError for latents [B, C, T, h, w] of another size."""
        latents = [self.temporal_vae.latent_frames(chunk) for chunk in chunks]
        if z.ndim != 5 or z.shape[1] != self.latent_channels or z.shape[2] != sum(latents):
            raise ValueError(
                f"the latents have shape {tuple(z.shape)}; {sum(chunks)} frames need "
                f"[B, {self.latent_channels}, {sum(latents)}, h, w]"
            )
        return latents

    def _raw(self, z: Tensor) -> Tensor:
        """Turn normalised latents into those of the temporal part."""
        return z.to(self.scale.dtype) * self.scale + self.shift


class _NoiseSource:
    """Gives posterior noise, one tensor per call: drawn, or taken from a recording."""

    def __init__(self, generator: torch.Generator | None, recorded: Iterator[Tensor] | None):
        self.generator = generator
        self.recorded = recorded

    def __call__(self, like: Tensor) -> Tensor:
        if self.recorded is not None:
            noise = next(self.recorded)
            if noise.shape != like.shape:
                raise ValueError(
                    f"recorded noise has shape {tuple(noise.shape)}; expected {tuple(like.shape)}"
                )
            return noise.to(like.device, like.dtype)
        device = like.device if self.generator is None else self.generator.device
        return torch.randn(like.shape, generator=self.generator, device=device, dtype=like.dtype).to(
            like.device
        )


def to_uint8(video: Tensor) -> Tensor:
    """Turn video [B, 3, F, H, W] in [-1, 1] into uint8 [B, F, H, W, 3]: clamp, to [0, 255], add 0.5, truncate.

    A value that is not finite is an error: as a byte it would look like an ordinary pixel.
    """
    if not torch.isfinite(video).all():
        bad = int((~torch.isfinite(video)).sum())
        raise ValueError(
            f"the decoded video has {bad} of {video.numel()} values that are not finite; check the latents "
            "and the VAE's weights and dtype"
        )
    pixels = video.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).add_(0.5)
    return pixels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
