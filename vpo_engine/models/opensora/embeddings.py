"""STDiT3's embedders: patches, positions, time, frame rate, captions.

Shape letters: B samples, C hidden channels, T latent frames, S = h * w patches of a frame, L text tokens, D
text channels. Submodule and parameter names are those of the published checkpoint.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_CHANNELS = 256
"""Width of the sinusoid that the time and frame-rate embedders start from."""


class PatchProjection(nn.Module):
    """The published Conv3d whose stride equals its kernel, as one matrix product over patches."""

    def __init__(self, in_channels: int, hidden_size: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, in_channels, 1, *patch))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        fan_in = in_channels * math.prod(patch)
        nn.init.uniform_(self.weight, -(fan_in**-0.5), fan_in**-0.5)
        nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Turn [B, in, T, H, W], with H and W multiples of the patch, into tokens [B, T, S, C]."""
        batch, channels, frames, height, width = x.shape
        rows, columns = self.weight.shape[-2:]
        patches = x.view(batch, channels, frames, height // rows, rows, width // columns, columns)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbedder(nn.Module):
    """The patch projection under its published name."""

    def __init__(self, in_channels: int, hidden_size: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.proj = PatchProjection(in_channels, hidden_size, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def position_embedding(rows: int, columns: int, channels: int, scale: float, like: Tensor) -> Tensor:
    """Return sinusoids of a frame's patch grid, [rows * columns, channels], in ``like``'s dtype and on its device.

    The first half of the channels encodes the column, the second half the row, each as cat(sin, cos).
    Coordinate i of an axis of n patches is (i / scale) * (base / n), with base the rounded square root of the
    patch count. Frequencies are rounded to ``like``'s dtype first, as the published model's buffer is;
    the angles are float32.
    """
    half = channels // 2
    exponents = torch.arange(0, half, 2, device=like.device, dtype=torch.float32) / half
    frequencies = (1.0 / 10000**exponents).to(like.dtype).float()
    base = round(math.sqrt(rows * columns))

    def axis(count: int) -> Tensor:
        coordinates = torch.arange(count, device=like.device, dtype=torch.float32) / scale * (base / count)
        angles = coordinates[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    by_column = axis(columns)[None].expand(rows, -1, -1)
    by_row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).to(like.dtype)


class ScalarEmbedder(nn.Module):
    """Embeds one number per sample: cat(cos, sin) of 128 frequencies, then Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_CHANNELS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def start_without_effect(self) -> None:
        """Let the result start at zero, but for the last bias, as published for the frame rate."""
        first, _, last = self.mlp
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.zeros_(last.weight)

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed [B] to [B, C]. The sinusoid is float32, as published, and then cast to ``dtype``."""
        half = FREQUENCY_CHANNELS // 2
        steps = torch.arange(half, device=value.device, dtype=torch.float32)
        angles = value[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class Mlp(nn.Module):
    """An MLP: Linear, tanh-GELU, Linear."""

    def __init__(self, in_channels: int, middle: int, out_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, middle)
        self.fc2 = nn.Linear(middle, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projects states of the text encoder to hidden channels. The buffer ``y_embedding`` holds the null caption."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.randn(max_length, caption_channels) / caption_channels**0.5)

    def forward(self, y: Tensor) -> Tensor:
        """Project [..., L, D] to [..., L, C]."""
        return self.y_proj(y)

    def replace(self, y: Tensor, rows: Tensor) -> Tensor:
        """Replace the marked captions (bool [B]) of y [B, 1, L, D] by the null caption."""
        null = self.y_embedding[: y.shape[-2]].to(y.dtype)
        return torch.where(rows[:, None, None, None], null, y)

    def drop(self, y: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
        """Apply caption dropout, for pretraining: a sample's whole caption becomes the null one, its mask stays.

        Never applied by ``STDiT3.forward``, whatever its mode: policy and reference must see the same
        captions.
        """
        device = y.device if generator is None else generator.device
        draws = torch.rand(y.shape[0], generator=generator, device=device)
        return self.replace(y, (draws < probability).to(y.device))
