"""STDiT3's transformer blocks and final layer.

Shape letters: B samples, T latent frames, S patches of a frame, C channels. Tokens travel as [B, T, S, C].
Modulations are [B, 1 or T, 1, C]: one per sample, or one per frame when some frames are conditioned. Text is
packed: [tokens, C], the valid tokens of every caption one after the other; a caption serves as many samples in a row
as there are samples to a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vpo_kernels.attention import BackendName, TextPlan, attention, text_attention
from vpo_kernels.fused_ops import BackendName as FusedOpsBackend
from vpo_kernels.fused_ops import uses_triton
from vpo_kernels.gated_residual import gated_residual
from vpo_kernels.modulated_norm import modulated_norm
from vpo_kernels.qk_norm_rope import qk_norm_rope
from vpo_kernels.temporal_attention import temporal_attention

from vpo_engine.memory.checkpointing import in_parts
from vpo_engine.models.opensora.embeddings import Mlp

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Backends:
    """The implementations of attention and of the small operations around it."""

    attention: BackendName = "sdpa"
    fused_ops: FusedOpsBackend = "auto"


class Backed(nn.Module):
    """A module whose operations come in several implementations."""

    backends = Backends()


class HeadNorm(Backed):
    """RMS norm over the channels of a head, computed in float32 or better; then rope, where it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalise [..., N, heads, channels]; shape and dtype stay."""
        cos, sin = rope or (None, None)
        return qk_norm_rope(x, self.weight, cos, sin, NORM_EPSILON, self.backends.fused_ops)


def rotary_tables(frequencies: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles position * frequency, [length, 1, pairs], in ``dtype``.

    The angles keep the dtype of the stored frequencies, so that a bf16 model turns by the angles it was
    trained with. Constants: the frequencies are stored as a parameter, but never trained.
    """
    frequencies = frequencies.detach()
    positions = torch.arange(length, device=frequencies.device, dtype=frequencies.dtype)
    angles = (positions[:, None] * frequencies)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class SelfAttention(Backed):
    """Self-attention with RMS-normed queries and keys; rope, where given, comes after that norm."""

    def __init__(self, channels: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.heads, self.temporal = heads, temporal
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = HeadNorm(channels // heads)
        self.k_norm = HeadNorm(channels // heads)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend within each sequence of [sequences, N, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = self.q_norm(q, rope), self.k_norm(k, rope)
        fused_ops = self.backends.fused_ops
        if self.temporal and uses_triton("temporal_attention", fused_ops, q):
            out = temporal_attention(q, k, v, fused_ops)
        else:
            out = attention(q, k, v, self.backends.attention)
        del q, k, v  # without grad, five times the size of the result
        return self.proj(out.flatten(2))


class KeysValues(NamedTuple):
    """Packed text as the cross-attention of one block reads it, each [tokens, heads, channels of a head]."""

    keys: Tensor
    values: Tensor


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def project_text(self, text: Tensor) -> KeysValues:
        """Project packed text [tokens, C] to keys and values, which serve at any time and for all samples."""
        return KeysValues(*self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).unbind(1))

    def forward(self, x: Tensor, text: Tensor | KeysValues, plan: TextPlan) -> Tensor:
        """Attend from x [B, N, C] to packed text, which ``plan`` divides between captions; return [B, N, C].

        The plan's rows are captions. There is one attention for each caption, with the queries of all its samples.
        """
        return self.proj(self.attend(self.q_linear(x), text, plan))

    def attend(self, q: Tensor, text: Tensor | KeysValues, plan: TextPlan) -> Tensor:
        """Compute ``forward`` between its two projections, from queries [B, N, C] to [B, N, C]."""
        k, v = text if isinstance(text, KeysValues) else self.project_text(text)
        by_caption = q.unflatten(-1, (self.heads, -1)).flatten(0, 1).unflatten(0, (plan.batch_size, -1))
        return text_attention(by_caption, k, v, plan).reshape(q.shape)


class Block(Backed):
    """Self-attention over space or over time, cross-attention to the text, MLP.

    The cross-attention reads the raw residual stream: not normalised, not modulated, not gated.
    """

    def __init__(self, channels: int, heads: int, mlp_channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.attn = SelfAttention(channels, heads, temporal)
        self.cross_attn = CrossAttention(channels, heads)
        self.mlp = Mlp(channels, mlp_channels, channels)

    def start_without_effect(self) -> None:
        """Let the block return its input, as published for the start of training."""
        for layer in (self.attn.proj, self.cross_attn.proj, self.mlp.fc2):
            nn.init.zeros_(layer.weight)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Attend within [B, T, S, C]: over T at each patch with rope, or over S in each frame without."""
        if self.temporal:
            out = self.attn(x.transpose(1, 2).flatten(0, 1).contiguous(), rope)
            return out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return self.attn(x.flatten(0, 1)).view(x.shape)

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        plan: TextPlan,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
        mlp_chunks: int = 1,
    ) -> Tensor:
        """Compute the block: x [B, T, S, C] to [B, T, S, C].

        text: [tokens, C], or its keys and values. time: modulations [B, 1 or T, 6, C]. mlp_chunks: the MLP goes over so
        many parts of the patches, one after the other.
        """
        modulation = self.modulation(time)
        x = self.mix(x, modulation[:3], rope)
        x = x + self.cross_attn(x.flatten(1, 2), text, plan).view(x.shape)
        return in_parts(self.feed_forward, x, modulation[3:], dim=2, parts=mlp_chunks)

    def modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of the self-attention, then of the MLP, from time [B, 1 or T, 6, C]."""
        return (self.scale_shift_table + time).unsqueeze(3).unbind(2)

    def mix(self, x: Tensor, modulation: Sequence[Tensor], rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return x + gate * self-attention of the modulated norm of x [B, T, S, C]; modulation: shift, scale, gate."""
        shift, scale, gate = modulation
        backend = self.backends.fused_ops
        mixed = self.attend(modulated_norm(x, shift, scale, NORM_EPSILON, backend), rope)
        return gated_residual(x, gate, mixed, backend)

    def feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Return x + gate * MLP of the modulated norm of x [B, T, S, C]; each token by itself."""
        backend = self.backends.fused_ops
        normed = modulated_norm(x, shift, scale, NORM_EPSILON, backend)
        return gated_residual(x, gate, self.mlp(normed), backend)


class FinalLayer(Backed):
    """Modulated norm, and projection to the values of a patch; the channel is the fastest index."""

    def __init__(self, channels: int, patch_values: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.linear = nn.Linear(channels, patch_values)

    def forward(self, x: Tensor, time: Tensor, clean_time: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """Compute patches [B, T, S, patch_values] from x [B, T, S, C] and time [B, C].

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
        return modulated_norm(x, shift, scale, NORM_EPSILON, self.backends.fused_ops)
