"""RAFT (Teed and Deng, arXiv 2003.12039): optical flow by repeated look-ups in a pyramid of correlations.

The state dict has the published key names (princeton-vl/RAFT, BSD-3-Clause). Letters: B pairs of images of H x W
pixels, h x w an eighth of them, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.weights import load_strict

NAME, FILE = "RAFT (things)", "raft-things.pth"
STRIDE, LEVELS, RADIUS, HIDDEN = 8, 4, 4, 128
LEAST_SIDE = STRIDE * (2**LEVELS - 1) + 1
"""The pixels from which the coarsest level of correlations is more than one pixel wide, after padding."""
ITERATIONS = 20


class _Block(nn.Module):
    """Two convolutions with norms and a residual."""

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.norm1, self.norm2 = norm(after), norm(after)
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride), norm(after)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu((x if self.downsample is None else self.downsample(x)) + y)


class _Encoder(nn.Module):
    """An image [B, 3, H, W] to a map [B, 256, h, w]."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(64), nn.Conv2d(3, 64, 7, 2, padding=3)
        self.layer1 = nn.Sequential(_Block(64, 64, 1, norm), _Block(64, 64, 1, norm))
        self.layer2 = nn.Sequential(_Block(64, 96, 2, norm), _Block(96, 96, 1, norm))
        self.layer3 = nn.Sequential(_Block(96, 128, 2, norm), _Block(128, 128, 1, norm))
        self.conv2 = nn.Conv2d(128, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class _MotionEncoder(nn.Module):
    """Correlations and the flow so far to 128 channels, of which the last two are the flow."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(192 + 64, 126, 3, padding=1)

    def forward(self, flow: Tensor, correlations: Tensor) -> Tensor:
        seen = F.relu(self.convc2(F.relu(self.convc1(correlations))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([seen, moved], dim=1))), flow], dim=1)


class _Gru(nn.Module):
    """A gated unit over rows, then over columns."""

    def __init__(self) -> None:
        super().__init__()
        inputs = HIDDEN + 256
        for axis, kernel, padding in (("1", (1, 5), (0, 2)), ("2", (5, 1), (2, 0))):
            for gate in "zrq":
                self.add_module(f"conv{gate}{axis}", nn.Conv2d(inputs, HIDDEN, kernel, padding=padding))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for axis in "12":
            update, reset, new = (self.get_submodule(f"conv{gate}{axis}") for gate in "zrq")
            both = torch.cat([hidden, x], dim=1)
            z, r = update(both).sigmoid(), reset(both).sigmoid()
            proposed = new(torch.cat([r * hidden, x], dim=1)).tanh()
            hidden = (1 - z) * hidden + z * proposed
        return hidden


class _FlowHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(HIDDEN, 256, 3, padding=1), nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(hidden)))


class _Update(nn.Module):
    """One refinement: the new state, the change of the flow, and the weights of upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gru, self.flow_head = _MotionEncoder(), _Gru(), _FlowHead()
        self.mask = nn.Sequential(
            nn.Conv2d(HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, STRIDE**2 * 9, 1)
        )

    def forward(
        self, hidden: Tensor, context: Tensor, correlations: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the new hidden state [B, 128, h, w] and the change of the flow [B, 2, h, w]."""
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow, correlations)], dim=1))
        return hidden, self.flow_head(hidden)


class Raft(nn.Module):
    """The network of raft-things.pth."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = _Encoder(nn.InstanceNorm2d)
        self.cnet = _Encoder(nn.BatchNorm2d)
        self.update_block = _Update()

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        *,
        where: str | Path = "the state dict",
        device: torch.device | str = "cpu",
    ) -> Raft:
        """Make the network with published weights, in float32.

        The file holds the norm of a downsampling twice; the one that counts is under ``downsample``. Raise ValueError,
        naming ``where`` and keys, for weights of another network.
        """
        plain = {key.removeprefix("module."): weight for key, weight in weights.items()}
        kept = {key: weight for key, weight in plain.items() if ".norm3." not in key}
        with torch.device("meta"):
            network = cls()
        remedy = f"give the file {FILE} of princeton-vl/RAFT"
        load_strict(network, kept, where=where, model=NAME, remedy=remedy, dtype=torch.float32, device=device)
        return network.eval().requires_grad_(False)

    def forward(self, before: Tensor, after: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
        """Return the flow in pixels at an eighth of the size [B, 2, h, w] and in full [B, 2, H, W].

        Images: float [B, 3, H, W] in 0..255, whose sides are multiples of 8.
        """
        first, second = (image / 255 * 2 - 1 for image in (before, after))
        pyramid = _pyramid(self.fnet(first), self.fnet(second))
        hidden, context = self.cnet(first).split(HIDDEN, dim=1)
        hidden, context = hidden.tanh(), context.relu()
        places = _places(hidden)
        flow = torch.zeros_like(places)
        for _ in range(iterations):
            hidden, change = self.update_block(hidden, context, _look_up(pyramid, places + flow), flow)
            flow = flow + change
        return flow, _upsample(flow, 0.25 * self.update_block.mask(hidden))


def padded(images: Tensor, stride: int = STRIDE) -> Tensor:
    """Return images [B, C, H, W] with the border repeated on all sides until sides are multiples of ``stride``."""
    rows, columns = (-side % stride for side in images.shape[2:])
    margins = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    return F.pad(images, margins, mode="replicate")


def frame_flow(network: Raft, before: Tensor, after: Tensor) -> Tensor:
    """Return the flow [2, H', W'] between two frames, uint8 [H, W, 3], of the padded frames, on the CPU."""
    device = next(network.parameters()).device
    pair = torch.stack([before, after]).to(device).permute(0, 3, 1, 2).float()
    images = padded(pair)
    return network(images[:1], images[1:])[1][0].cpu()


def _places(like: Tensor) -> Tensor:
    """Return the coordinates (column, row) of each place, [B, 2, h, w]."""
    height, width = like.shape[2:]
    rows = torch.arange(height, device=like.device, dtype=like.dtype).view(-1, 1).expand(height, width)
    columns = torch.arange(width, device=like.device, dtype=like.dtype).expand(height, width)
    return torch.stack([columns, rows]).expand(len(like), -1, -1, -1)


def _pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return the correlations [B h w, 1, h, w] of all places of two maps [B, D, h, w], then at halved sizes."""
    batch, channels, height, width = first.shape
    products = first.flatten(2).mT @ second.flatten(2) / channels**0.5
    level = products.view(batch * height * width, 1, height, width)
    levels = [level]
    for _ in range(LEVELS - 1):
        level = F.avg_pool2d(level, 2)
        levels.append(level)
    return levels


def _look_up(pyramid: list[Tensor], places: Tensor) -> Tensor:
    """Return the correlations around ``places`` [B, 2, h, w], for each level a window, [B, 4 x 81, h, w].

    As in the published network, the window runs over columns first.
    """
    batch, _, height, width = places.shape
    steps = torch.linspace(-RADIUS, RADIUS, 2 * RADIUS + 1, device=places.device, dtype=places.dtype)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)  # (column, row) at [i, j]
    centres = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for number, level in enumerate(pyramid):
        at = centres / 2**number + window
        size = at.new_tensor([level.shape[3] - 1, level.shape[2] - 1])
        seen = F.grid_sample(level, 2 * at / size - 1, mode="bilinear", align_corners=True)
        found.append(seen.view(batch, height, width, -1))
    return torch.cat(found, dim=3).permute(0, 3, 1, 2).contiguous()


def _upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """Return the flow [B, 2, h, w] at full size, each pixel a weighted mean of the nine places around it."""
    batch, _, height, width = flow.shape
    weights = mask.view(batch, 1, 9, STRIDE, STRIDE, height, width).softmax(dim=2)
    around = F.unfold(STRIDE * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    grown = (weights * around).sum(dim=2).permute(0, 1, 4, 2, 5, 3)
    return grown.reshape(batch, 2, STRIDE * height, STRIDE * width)
