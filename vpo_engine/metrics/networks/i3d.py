"""I3D on RGB (Carreira and Zisserman, arXiv 1705.07750) with 400 logits, under the key names of i3d_pretrained_400.pt.

Letters: B clips, T frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.weights import load_strict

NAME, FILE = "I3D (Kinetics-400)", "i3d_pretrained_400.pt"
LOGITS = 400
_Size = tuple[int, int, int]
_MIXED: dict[str, tuple[int, tuple[int, int, int, int, int, int]]] = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
"""Channels before each module, and of its branches."""
_POOLS: dict[str, tuple[_Size, _Size]] = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
"""Kernel and stride of the pooling in front of a module."""


class _Unit(nn.Module):
    """A convolution as wide as TensorFlow's SAME, batch norm and ReLU; the logits have a bias and neither."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: _Size = (1, 1, 1),
        stride: _Size = (1, 1, 1),
        last: bool = False,
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(before, after, kernel, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(after, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class _Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, before: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        kernel = (3, 3, 3)
        self.b0 = _Unit(before, channels[0])
        self.b1a, self.b1b = _Unit(before, channels[1]), _Unit(channels[1], channels[2], kernel)
        self.b2a, self.b2b = _Unit(before, channels[3]), _Unit(channels[3], channels[4], kernel)
        self.b3b = _Unit(before, channels[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3d(nn.Module):
    """The network without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = _Unit(1024, LOGITS, last=True)
        self.Conv3d_1a_7x7 = _Unit(3, 64, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, (3, 3, 3))
        for name, (before, channels) in _MIXED.items():
            self.add_module(name, _Mixed(before, channels))

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        *,
        where: str | Path = "the state dict",
        device: torch.device | str = "cpu",
    ) -> I3d:
        """Make the network with published weights, in float32. Raise ValueError for weights of another network."""
        with torch.device("meta"):
            network = cls()
        remedy = f"give the file {FILE} of songweige/TATS"
        load_strict(
            network, weights, where=where, model=NAME, remedy=remedy, dtype=torch.float32, device=device
        )
        return network.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits [B, 400], averaged over time, of clips [B, 3, T, 224, 224] in -1..1 with T >= 9."""
        x = clips
        for name, module in self.named_children():
            if name == "logits":
                continue
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            x = module(x)
        x = self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1))
        return x.mean(dim=(2, 3, 4))


def _max_pool(x: Tensor, kernel: _Size, stride: _Size) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


def _same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad x [B, C, T, H, W] with zeros, more behind than in front, as TensorFlow's SAME does."""
    margins: list[int] = []
    for length, size, step in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max(size - (length % step or step), 0)
        margins += [total // 2, total - total // 2]
    return F.pad(x, margins)
