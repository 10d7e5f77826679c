"""The temporal half of the Open-Sora 1.2 VAE: a causal 3-D convolutional autoencoder over spatial latents.

Architecture and key names follow ``opensora/models/vae/vae_temporal.py`` of Open-Sora v1.2.0.
Shape letters: B clips, C channels, F frames before and T latents after temporal compression, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian; ``logvar`` is clamped to [-30, 20] when it is made."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise; noise has the shape of the mean."""
        return torch.addcmul(self.mean, torch.exp(0.5 * self.logvar), noise)

    @staticmethod
    def from_moments(moments: Tensor) -> Posterior:
        """Split [B, 2C, ...] into mean and log variance, [B, C, ...] each."""
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))


@dataclass(frozen=True)
class TemporalConfig:
    """Sizes of the temporal half; the defaults are those of OpenSora-VAE-v1.2."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries for "
                f"{len(self.channel_multipliers)} channel_multipliers; it needs one per step between stages, "
                f"{len(self.channel_multipliers) - 1}"
            )

    @property
    def factor(self) -> int:
        """Return the number of frames per latent."""
        return int(2 ** sum(self.temporal_downsample))


class CausalConv3d(nn.Module):
    """Conv3d that sees no later frame: zeros in front of time only, half a kernel of zeros around space."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = True):
        super().__init__()
        self.time_pad = kernel - stride
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            kernel,
            stride=(stride, 1, 1),
            padding=(0, kernel // 2, kernel // 2),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.time_pad:
            x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0))
        return self.conv(x)


class DoubleFrames(CausalConv3d):
    """Doubles the frames of [B, C, T, h, w]: convolves to channels indexed (C, 2), then moves the 2 into time."""

    def __init__(self, channels: int):
        super().__init__(channels, 2 * channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut that is a 1x1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        widens = in_channels != out_channels
        self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv3(x)


def _stage(in_channels: int, out_channels: int, config: TemporalConfig) -> nn.Sequential:
    """Return ``num_res_blocks`` blocks, of which the first changes the width."""
    widths = [in_channels] + [out_channels] * config.num_res_blocks
    return nn.Sequential(*(ResBlock(a, b, config.num_groups) for a, b in pairwise(widths)))


class Encoder(nn.Module):
    """Encodes [B, C, F, h, w], F a multiple of the factor, to moments [B, 2 * latent_embed_dim, F / factor, h, w]."""

    def __init__(self, config: TemporalConfig):
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _stage(a, b, config) for a, b in zip([config.filters, *widths[:-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride=2) if down else nn.Identity()
            for width, down in zip(widths[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = _stage(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, stage in enumerate(self.block_res_blocks):
            x = stage(x)
            if index < len(self.conv_blocks):
                x = self.conv_blocks[index](x)
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    """Decodes [B, latent_embed_dim, T, h, w] to [B, in_out_channels, factor * T, h, w]; the last stage comes first."""

    def __init__(self, config: TemporalConfig):
        super().__init__()
        widths = [config.filters * m for m in config.channel_multipliers]
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], 3)
        self.res_blocks = _stage(widths[-1], widths[-1], config)
        self.block_res_blocks = nn.ModuleList(
            _stage(a, b, config) for a, b in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            DoubleFrames(width) if up else nn.Identity()
            for width, up in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for index in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[index](x)
            if index > 0:
                x = self.conv_blocks[index - 1](x)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Compresses time by ``config.factor``. Works on one chunk; chunking belongs to ``OpenSoraVAE``."""

    def __init__(self, config: TemporalConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = Decoder(config)

    def latent_frames(self, num_frames: int) -> int:
        """Return the number of latents of a chunk: ceil(num_frames / factor)."""
        return -(-num_frames // self.config.factor)

    def posterior(self, x: Tensor) -> Posterior:
        """Encode [B, C, F, h, w], zero-padded in front, to a posterior over [B, embed_dim, ceil(F / factor), h, w]."""
        missing = -x.shape[2] % self.config.factor
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return Posterior.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Decode [B, embed_dim, T, h, w] to [B, C, num_frames, h, w]; the padding's frames are dropped."""
        assert z.shape[2] == self.latent_frames(num_frames), (z.shape, num_frames)
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, x.shape[2] - num_frames :]
