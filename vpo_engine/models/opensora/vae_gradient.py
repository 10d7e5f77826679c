"""Decode chosen frames of Open-Sora's videos with gradients, for methods that learn through the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpo_engine.memory.checkpointing import recomputed
from vpo_engine.models.opensora.vae import OpenSoraVAE


def decode_with_gradients(
    vae: OpenSoraVAE,
    z: Tensor,
    num_frames: int,
    frames: Sequence[int] | None = None,
    frames_at_once: int | None = None,
) -> Tensor:
    """Decode normalised latents [B, C, T, h, w] to frames [B, f, 3, H, W], near [-1, 1], not clamped.

    frames: numbers below ``num_frames``, in the order of the result; None: all. The temporal part decodes the chunks
    that have one of them, each as a whole, because its norms see all frames of a chunk; the image part decodes the
    wanted frames alone, ``frames_at_once`` at a time (None: as published). Chunks and micro-batches are checkpointed
    one by one. Without ``frames`` the values are those of ``OpenSoraVAE.decode``, bit for bit.
    """
    wanted = list(range(num_frames)) if frames is None else list(frames)
    chunks = vae.chunks(num_frames)
    parts = z.split([vae.temporal_vae.latent_frames(chunk) for chunk in chunks], dim=2)
    decoded: list[Tensor] = []
    places: dict[int, int] = {}
    start = 0
    for part, length in zip(parts, chunks, strict=True):
        inside = [number for number in range(start, start + length) if number in set(wanted)]
        if inside:
            raw = part.to(vae.scale.dtype) * vae.scale + vae.shift
            chunk = recomputed(vae.temporal_vae.decode, raw, length)
            decoded.append(chunk[:, :, [number - start for number in inside]])
            places |= {number: len(places) + place for place, number in enumerate(inside)}
        start += length
    x_z = torch.cat(decoded, dim=2)[:, :, [places[number] for number in wanted]] / vae.spatial_scaling
    images = x_z.transpose(1, 2).flatten(0, 1)
    size = frames_at_once or vae.spatial_vae.micro_batches(len(images))
    pixels = torch.cat([recomputed(_image, vae, part) for part in images.split(size)])
    return pixels.unflatten(0, (len(z), len(wanted)))


def _image(vae: OpenSoraVAE, latents: Tensor) -> Tensor:
    pixels: Tensor = vae.spatial_vae.module.decode(latents).sample
    return pixels
