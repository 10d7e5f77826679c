"""DINO's ViT (arXiv 2104.14294) and VideoMAE's (arXiv 2303.16727), under their published key names.

Letters: B images or clips, T frames, H x W pixels, D channels, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.metrics.networks.checkpoints import depth_of, size_of
from vpo_engine.rewards.vit import Block
from vpo_engine.weights import load_strict

DINO, VIDEOMAE = "DINO ViT-B/16", "VideoMAEv2 ViT-g/14 (SSv2)"
DINO_FILE, VIDEOMAE_FILE = "dino_vitbase16_pretrain.pth", "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
_ROUNDING = 0.1
"""What DINO adds to a number of patches before it divides, so that the sizes of results are not rounded down."""


class DinoNetwork(nn.Module):
    """A ViT that gives the feature of an image: its class token after the last norm."""

    def __init__(self, *, width: int, patch: int, depth: int, heads: int, hidden: int, tokens: int) -> None:
        """``tokens``: positions in the table, with that of the class token."""
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        *,
        heads: int | None = None,
        where: str | Path = "the state dict",
        device: torch.device | str = "cpu",
    ) -> DinoNetwork:
        """Make the network that the weights are of, in float32; heads have 64 channels by default.

        Raise ValueError, naming ``where`` and keys, for weights of another network.
        """
        width = size_of(weights, "pos_embed", 2, DINO)
        with torch.device("meta"):
            network = cls(
                width=width,
                patch=size_of(weights, "patch_embed.proj.weight", 3, DINO),
                depth=depth_of(weights, "blocks."),
                heads=heads or width // 64,
                hidden=size_of(weights, "blocks.0.mlp.fc1.weight", 0, DINO),
                tokens=size_of(weights, "pos_embed", 1, DINO),
            )
        remedy = f"give the file {DINO_FILE} of facebookresearch/dino"
        load_strict(
            network, weights, where=where, model=DINO, remedy=remedy, dtype=torch.float32, device=device
        )
        return network.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [B, D] of normalised pixels [B, 3, H, W]; what is left beside whole patches is dropped."""
        patches = self.patch_embed["proj"](pixels)
        positions = self._positions(patches.shape[2], patches.shape[3])
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return the table [1, N, D] for these patches: bicubic, with DINO's own scale, a little above their ratio."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if rows == columns == side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + _ROUNDING) / side, (columns + _ROUNDING) / side)
        grown = F.interpolate(table, scale_factor=scale, mode="bicubic")
        assert grown.shape[2:] == (rows, columns), grown.shape
        return torch.cat([self.pos_embed[:, :1], grown.flatten(2).mT], dim=1)


class VideoMaeNetwork(nn.Module):
    """A ViT over tubes of frames that gives the feature of a clip: the norm of its tokens' mean."""

    FRAMES, SIDE = 16, 224
    """The frames and pixels that the table of positions is made for."""

    def __init__(self, *, width: int, patch: int, tubelet: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        size = (tubelet, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, size, size)})
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self._grid = (self.FRAMES // tubelet, self.SIDE // patch, self.SIDE // patch)

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        *,
        heads: int = 16,
        where: str | Path = "the state dict",
        device: torch.device | str = "cpu",
    ) -> VideoMaeNetwork:
        """Make the network that the weights are of, in float32, without its classifier.

        Raise ValueError, naming ``where`` and keys, for weights of another network.
        """
        proj = "patch_embed.proj.weight"
        with torch.device("meta"):
            network = cls(
                width=size_of(weights, proj, 0, VIDEOMAE),
                patch=size_of(weights, proj, 4, VIDEOMAE),
                tubelet=size_of(weights, proj, 2, VIDEOMAE),
                depth=depth_of(weights, "blocks."),
                heads=heads,
                hidden=size_of(weights, "blocks.0.mlp.fc1.weight", 0, VIDEOMAE),
            )
        remedy = f"give the file {VIDEOMAE_FILE} of OpenGVLab/VideoMAEv2"
        load_strict(
            network,
            _with_key_bias(weights),
            where=where,
            model=VIDEOMAE,
            remedy=remedy,
            dtype=torch.float32,
            device=device,
        )
        return network.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Return features [B, D] of clips [B, 3, T, SIDE, SIDE] in 0..1."""
        x = self.patch_embed["proj"](clips)
        positions = self._positions(x.shape[2]).to(x)
        x = x.flatten(2).mT + positions
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(dim=1))

    def _positions(self, times: int) -> Tensor:
        """Return the table of positions [1, N, D], float32; over another number of tubes it is interpolated."""
        width = self.fc_norm.normalized_shape[0]
        table = sinusoid_table(int(np.prod(self._grid)), width)
        if times == self._grid[0]:
            return table
        grid = table.mT.unflatten(2, self._grid)
        scale = ((times + _ROUNDING) / self._grid[0], 1.0, 1.0)
        return F.interpolate(grid, scale_factor=scale, mode="trilinear").flatten(2).mT


def sinusoid_table(positions: int, width: int) -> Tensor:
    """Return sines in even and cosines in odd channels, float32 [1, positions, width], computed in float64."""
    channels = np.arange(width)
    angles = np.arange(positions)[:, None] / np.power(10000, 2 * (channels // 2) / width)
    table = np.where(channels % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table).float().unsqueeze(0)


def _with_key_bias(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the classifier; biases of queries and values are joined to one with zeros for keys."""
    kept = {key: weight for key, weight in weights.items() if not key.startswith("head.")}
    for key in [key for key in kept if key.endswith(".attn.q_bias")]:
        place = key.removesuffix("q_bias")
        query, value = kept.pop(key), kept.pop(f"{place}v_bias", None)
        if value is not None:
            kept[f"{place}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return kept
