"""STDiT3's transformer blocks and final layer.

Shape letters: B samples, T latent frames, S patches of a frame, C channels, L text tokens. Tokens travel as
[B, T, S, C]. Modulations are [B, 1 or T, 1, C]: one per sample, or one per frame when some frames are
conditioned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.models.opensora.embeddings import Mlp

NORM_EPSILON = 1e-6


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine parameters, times (1 + scale), plus shift."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=NORM_EPSILON)
    return torch.addcmul(shift, normed, 1 + scale)


class HeadNorm(nn.Module):
    """RMS norm over the channels of a head, computed in float32 or better."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] to the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPSILON)


def rotary_tables(frequencies: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position * frequency, [length, 1, pairs], in ``dtype``.

    The angles keep the dtype of the stored frequencies, so that a bf16 model turns by the angles it was
    trained with.
    """
    positions = torch.arange(length, device=frequencies.device, dtype=frequencies.dtype)
    angles = (positions[:, None] * frequencies)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [..., N, heads, channels] on interleaved pairs (0, 1), (2, 3), ..."""
    cos, sin = (table.to(x.dtype) for table in rope)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    """Self-attention with RMS-normed queries and keys; rope, where given, comes after that norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = HeadNorm(channels // heads)
        self.k_norm = HeadNorm(channels // heads)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[rows, N, C] to [rows, N, C], attention within a row."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """x [B, N, C], text [B, L, C], text_mask bool [B, L] or None (all count), to [B, N, C]."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        bias = None if text_mask is None else text_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention over space or over time, cross-attention to the text, MLP.

    The cross-attention reads the raw residual stream: not normalised, not modulated, not gated.
    """

    def __init__(self, channels: int, heads: int, mlp_channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.attn = SelfAttention(channels, heads)
        self.cross_attn = CrossAttention(channels, heads)
        self.mlp = Mlp(channels, mlp_channels, channels)

    def start_without_effect(self) -> None:
        for layer in (self.attn.proj, self.cross_attn.proj, self.mlp.fc2):
            nn.init.zeros_(layer.weight)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, S, C]: attention over T at each patch with rope, or over S in each frame without."""
        if self.temporal:
            out = self.attn(x.transpose(1, 2).flatten(0, 1), rope)
            return out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return self.attn(x.flatten(0, 1)).view(x.shape)

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor | None, time: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, T, S, C], text [B, L, C], time [B, 1 or T, 6, C] to [B, T, S, C]."""
        modulation = (self.scale_shift_table + time).unsqueeze(3).unbind(2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = torch.addcmul(x, gate, self.attend(modulated_norm(x, shift, scale), rope))
        x = x + self.cross_attn(x.flatten(1, 2), text, text_mask).view(x.shape)
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_scale)))


class FinalLayer(nn.Module):
    """Modulated norm and projection to the values of a patch, channel fastest."""

    def __init__(self, channels: int, patch_values: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.linear = nn.Linear(channels, patch_values)

    def forward(self, x: Tensor, time: Tensor, clean_time: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """x [B, T, S, C], time [B, C] to [B, T, S, patch_values].

        With x_mask [B, T], conditioned frames (False) are normalised a second time, on top of the modulation
        by ``time``, now with ``clean_time`` [B, C]. The published model does so and was trained so
        (opensora/models/stdit/stdit3.py, T2IFinalLayer.forward).
        """
        x = self._modulate(x, time)
        if x_mask is not None:
            assert clean_time is not None
            x = torch.where(x_mask[:, :, None, None], x, self._modulate(x, clean_time))
        return self.linear(x)

    def _modulate(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None, None].unbind(1)
        return modulated_norm(x, shift, scale)
