"""The sprites world's two-part VAE: ``OpenSoraVAE`` with a spatial part of factor 4, trained on the mixture."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vpo_engine.data.sprites.damage import sample_destroyed, sample_mixture
from vpo_engine.data.sprites.descent import Descent, Say
from vpo_engine.models.opensora.vae import OpenSoraVAE, to_uint8

SPATIAL_CHANNELS, CHANNELS = 4, 8
CLIPS = 1500
CONFIG: dict[str, Any] = {
    "spatial_config": {
        "act_fn": "silu",
        "block_out_channels": [8, 16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": SPATIAL_CHANNELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    },
    "temporal_config": {
        "in_out_channels": SPATIAL_CHANNELS,
        "latent_embed_dim": CHANNELS,
        "embed_dim": CHANNELS,
        "filters": 16,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 2, 2, 2],
        "temporal_downsample": [False, True, True],
        "num_groups": 4,
    },
    "micro_frame_size": 17,
    "micro_batch_size": 64,
    "spatial_scaling": 1.0,
    "scale": [1.0] * CHANNELS,
    "shift": [0.0] * CHANNELS,
}


def to_pixels(videos: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def training_clips(count: int, generator: torch.Generator) -> Tensor:
    """Mostly the mixture, some destroyed clips, so that the autoencoder is at home off the beaten track too."""
    destroyed = sample_destroyed(count // 20, generator).videos
    return to_pixels(torch.cat([sample_mixture(count - len(destroyed), generator).videos, destroyed]))


@torch.no_grad()
def round_trip(vae: OpenSoraVAE, videos: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] through the autoencoder and back, as a policy's clips are decoded."""
    return to_uint8(vae.decode(vae.encode(to_pixels(videos), sample=False), videos.shape[1]))


def psnr(vae: OpenSoraVAE, generator: torch.Generator, count: int = 128) -> float:
    """Peak signal to noise ratio in dB of the mean reconstruction of held-out clips of the mixture."""
    clips = to_pixels(sample_mixture(count, generator).videos)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(clips, sample=False), clips.shape[2]).clamp(-1, 1)
    return 10 * math.log10(4 / float((decoded - clips).square().mean()))


def train_vae(seed: int, say: Say, steps: tuple[int, int, int] = (700, 260, 40)) -> OpenSoraVAE:
    """First the spatial part on single frames, then the temporal part on its latents, then both on whole clips.

    Latents get a little noise while training, so that the decoder forgives a sampler's errors. Between the
    stages the spatial latents, and in the end ``scale`` and ``shift``, are set so that the mixture's latents
    have deviation 1, as the published ones do for video.
    """
    torch.manual_seed(seed)
    vae = OpenSoraVAE.from_config(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    clips = training_clips(CLIPS, generator)

    def pick(count: int) -> Tensor:
        return torch.randint(CLIPS, (count,), generator=generator)

    def frames_loss() -> Tensor:
        frames = clips[pick(32), :, torch.randint(clips.shape[2], (32,), generator=generator)].unsqueeze(2)
        latents = vae.spatial_posterior(frames).mean
        return (
            _error(vae.decode_spatial(_disturb(latents, generator)), frames) + 1e-5 * latents.square().mean()
        )

    Descent(vae.spatial_vae, steps[0], 0.03, 4e-3).run(frames_loss, "VAE, spatial part", say)
    with torch.no_grad():
        spatial = torch.cat([vae.spatial_posterior(part).mean for part in clips.split(64)])
    vae.spatial_scaling = vae.config["spatial_scaling"] = 1 / float(spatial.std())
    spatial *= vae.spatial_scaling

    def latents_loss() -> Tensor:
        wanted = spatial[pick(16)]
        latents = vae.temporal_posterior(wanted).mean
        return _error(vae.decode_temporal(_disturb(latents, generator), clips.shape[2]), wanted)

    Descent(vae.temporal_vae, steps[1], 0.03, 4e-3).run(latents_loss, "VAE, temporal part", say)

    def clips_loss() -> Tensor:
        wanted = clips[pick(12)]
        latents = vae.temporal_posterior(vae.spatial_posterior(wanted).mean * vae.spatial_scaling).mean
        decoded = vae.decode_spatial(vae.decode_temporal(_disturb(latents, generator), clips.shape[2]))
        return _error(decoded, wanted)

    Descent(vae, steps[2], 0.004, 1e-3).run(clips_loss, "VAE, both parts", say)
    vae.eval().requires_grad_(False)
    _normalise(vae, generator)
    say(f"VAE: {psnr(vae, generator):.1f} dB on held-out clips")
    return vae


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    difference = found - wanted
    return difference.abs().mean() + 4 * difference.square().mean()


def _disturb(latents: Tensor, generator: torch.Generator) -> Tensor:
    return latents + 0.03 * torch.randn(latents.shape, generator=generator)


def _normalise(vae: OpenSoraVAE, generator: torch.Generator) -> None:
    clips = to_pixels(sample_mixture(512, generator).videos)
    with torch.no_grad():
        latents = vae.encode(clips, sample=False)
    vae.shift.copy_(latents.mean(dim=(0, 2, 3, 4)).view_as(vae.shift))
    vae.scale.copy_(latents.std(dim=(0, 2, 3, 4)).view_as(vae.scale))
    vae.config["scale"], vae.config["shift"] = vae.scale.flatten().tolist(), vae.shift.flatten().tolist()
