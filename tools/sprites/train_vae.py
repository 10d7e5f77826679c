"""Train the sprites world's two-part VAE: ``OpenSoraVAE`` with a spatial part of factor 4, on the mixture."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tools.sprites.optimizers import Log, MuonAndAdam
from vpo_engine.data.sprites.assets import to_pixels
from vpo_engine.data.sprites.damage import sample_destroyed, sample_mixture
from vpo_engine.models.opensora.vae import OpenSoraVAE

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


def training_clips(count: int, generator: torch.Generator) -> Tensor:
    """Draw clips of the mixture and 5 % destroyed clips, so that the autoencoder can show unusual frames too."""
    destroyed = sample_destroyed(count // 20, generator).videos
    return to_pixels(torch.cat([sample_mixture(count - len(destroyed), generator).videos, destroyed]))


def psnr(vae: OpenSoraVAE, generator: torch.Generator, count: int = 128) -> float:
    """Return the peak signal-to-noise ratio, in dB, of the mean reconstruction of held-out clips of the mixture."""
    clips = to_pixels(sample_mixture(count, generator).videos)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(clips, sample=False), clips.shape[2]).clamp(-1, 1)
    return 10 * math.log10(4 / float((decoded - clips).square().mean()))


def train_vae(seed: int, log: Log, steps: tuple[int, int, int] = (700, 260, 40)) -> OpenSoraVAE:
    """Train the spatial part on single frames, then the temporal part on its latents, then both on whole clips.

    A little noise is added to the latents while training, so that the decoder tolerates a sampler's errors. The
    mixture's latents get standard deviation 1, as the published ones have for video: the spatial latents are
    rescaled after the first stage, and ``scale`` and ``shift`` are set at the end.
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

    MuonAndAdam(vae.spatial_vae, steps[0], 0.03, 4e-3).run(frames_loss, "VAE, spatial part", log)
    with torch.no_grad():
        spatial = torch.cat([vae.spatial_posterior(part).mean for part in clips.split(64)])
    vae.spatial_scaling = vae.config["spatial_scaling"] = 1 / float(spatial.std())
    spatial *= vae.spatial_scaling

    def latents_loss() -> Tensor:
        wanted = spatial[pick(16)]
        latents = vae.temporal_posterior(wanted).mean
        return _error(vae.decode_temporal(_disturb(latents, generator), clips.shape[2]), wanted)

    MuonAndAdam(vae.temporal_vae, steps[1], 0.03, 4e-3).run(latents_loss, "VAE, temporal part", log)

    def clips_loss() -> Tensor:
        wanted = clips[pick(12)]
        latents = vae.temporal_posterior(vae.spatial_posterior(wanted).mean * vae.spatial_scaling).mean
        decoded = vae.decode_spatial(vae.decode_temporal(_disturb(latents, generator), clips.shape[2]))
        return _error(decoded, wanted)

    MuonAndAdam(vae, steps[2], 0.004, 1e-3).run(clips_loss, "VAE, both parts", log)
    vae.eval().requires_grad_(False)
    _normalise(vae, generator)
    log(f"VAE: {psnr(vae, generator):.1f} dB on held-out clips")
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
