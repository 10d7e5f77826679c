"""The networks of the sprites world's reward, its judge and its image reward, and their files.

Letters: B clips, F frames, K keypoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from vpo_engine.data.sprites.world import COLOURS, DIRECTIONS, FRAMES, SHAPES, SIZE

OUTPUTS = (6, len(COLOURS), len(SHAPES), len(DIRECTIONS))
"""Five severities in the order of ``damage.KINDS`` and invalidity; then the logits of the attributes."""
BUILD_COMMAND = "python -m tools.sprites build"


@dataclass(frozen=True)
class Reading:
    """A network's reading of B clips; logits, float32."""

    defects: Tensor
    """[B, 6]: sigmoid gives the severities (columns as ``damage.KINDS``) and the degree of destruction."""
    colour: Tensor
    shape: Tensor
    direction: Tensor

    @staticmethod
    def split(outputs: Tensor) -> Reading:
        return Reading(*outputs.split(OUTPUTS, dim=1))


def _grid(side: int) -> Tensor:
    """Return coordinates in -1..1 of a side x side map, [side * side, 2] (x, y)."""
    line = torch.linspace(-1, 1, side)
    return torch.stack((line.repeat(side), line.repeat_interleave(side)), dim=1)


def _pixels(videos: Tensor) -> tuple[Tensor, Tensor]:
    """Turn levels 0..255 [B, F, H, W, 3] into frames less their own mean, [B * F, 3, H, W], and the means, [B * F, 3].

    Levels are uint8, or floats that may have gradients.
    """
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2) / 64
    mean = frames.mean(dim=(2, 3))
    return frames - mean[:, :, None, None], mean - 1


def _peak(maps: Tensor) -> Tensor:
    """Return the largest value [n, C] of each channel of [n, C, H, W]: weak edge responses show blur."""
    return F.max_pool2d(maps, maps.shape[-1]).flatten(1)


class _OverTime(nn.Module):
    """A residual convolution over time of [B, F, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Conv1d(width, width, 5, padding=2)
        self.out = nn.Linear(width, width)

    def forward(self, track: Tensor) -> Tensor:
        wide = self.wide(self.norm(track).transpose(1, 2)).transpose(1, 2)
        return track + self.out(F.gelu(wide))


class _Frames(nn.Module):
    """Reads frames: soft-argmax keypoints with the features there, edge strengths and layout."""

    seen: int
    """Return how many channels ``look`` gives for a frame."""

    def __init__(self, keypoints: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, stride=2, padding=1)
        self.heat = nn.Conv2d(24, keypoints, 3, padding=1)
        self.near = nn.Sequential(nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU())
        self.far = nn.Sequential(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU())
        self.layout = nn.Conv2d(48, 64, SIZE // 8)
        self.seen = 24 * (keypoints + 2) + 32 + 48 + 64

    def look(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return where the keypoints of frames [n, 3, H, W] (of ``_pixels``) are, the features there, layout and edges.

        They are shares [n, K, 256] of the 16 x 16 places, and [n, 24 K], [n, 64] and [n, 128].
        """
        stem = F.relu(self.stem(frames))  # [n, 24, 16, 16]
        share = self.heat(stem).flatten(2).softmax(2)  # [n, K, 256]
        there = (share @ stem.flatten(2).transpose(1, 2)).flatten(1)
        near = self.near(stem)  # [n, 32, 8, 8]
        far = self.far(near)  # [n, 48, 4, 4]
        edges = torch.cat((stem.mean(dim=(2, 3)), _peak(stem), _peak(near), _peak(far)), dim=1)
        return share, there, self.layout(far).flatten(1), edges


class RewardNetwork(_Frames):
    """Convolves over time soft-argmax keypoints, the features there, and each frame's layout."""

    grid: Tensor

    def __init__(self, keypoints: int = 8, width: int = 96) -> None:
        super().__init__(keypoints)
        self.track = nn.Linear(3 * (2 * keypoints + 3) + self.seen, width)
        self.mix = nn.ModuleList(_OverTime(width) for _ in range(2))
        self.head = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, 128), nn.GELU(), nn.Linear(128, sum(OUTPUTS))
        )
        self.register_buffer("grid", _grid(SIZE // 2), persistent=False)

    def forward(self, videos: Tensor) -> Reading:
        """Return what is seen in videos of levels 0..255, [B, F, H, W, 3], uint8 or floats."""
        count = videos.shape[0]
        frames, level = _pixels(videos)
        share, *seen = self.look(frames)
        points = torch.cat(((share @ self.grid).flatten(1), level), dim=1).view(count, FRAMES, -1)
        speed = F.pad(points.diff(dim=1), (0, 0, 1, 0))
        bend = F.pad(points.diff(n=2, dim=1), (0, 0, 1, 1))
        frame = torch.cat(seen, dim=1)
        track = self.track(torch.cat((points, 16 * speed, 8 * bend, frame.view(count, FRAMES, -1)), dim=2))
        for layer in self.mix:
            track = layer(track)
        return Reading.split(self.head(torch.cat((track.mean(1), track.amax(1)), dim=1)))


class JudgeNetwork(nn.Module):
    """Pools frames and their differences to tokens by attention, then applies self-attention over time."""

    grid: Tensor

    def __init__(self, points: int = 8, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 20, 5, stride=2, padding=2), nn.SiLU())
        self.query = nn.Conv2d(20, points, 3, padding=1)
        self.near = nn.Sequential(nn.Conv2d(20, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.SiLU())
        self.far = nn.Sequential(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.SiLU())
        seen = 22 * points + 3 + 20 + 48
        self.token = nn.Linear(2 * seen + 2 * (2 * points + 3) + 32 + 48, width)
        self.local = nn.Conv1d(width, width, 3, padding=1)
        self.time = nn.Parameter(torch.randn(FRAMES, width) * 0.02)
        self.mix = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, sum(OUTPUTS)))
        self.register_buffer("grid", _grid(SIZE // 2), persistent=False)

    def forward(self, videos: Tensor) -> Reading:
        """Return what is seen in videos of levels 0..255, [B, F, H, W, 3], uint8 or floats."""
        count = videos.shape[0]
        frames, level = _pixels(videos)
        features = self.features(frames)  # [B F, 20, 16, 16]
        share = self.query(features).flatten(2).softmax(2)  # [B F, K, 256]
        place = torch.cat(((share @ self.grid).flatten(1), level), dim=1)
        seen = (share @ features.flatten(2).transpose(1, 2)).flatten(1)
        near = self.near(features)  # [B F, 32, 8, 8]
        far = self.far(near)  # [B F, 48, 4, 4]
        frame = torch.cat((place, seen, far.mean(dim=(2, 3)), _peak(features)), dim=1)
        frame = frame.view(count, FRAMES, -1)
        oddest = torch.cat((_peak(near), _peak(far)), dim=1).view(count, FRAMES, -1)
        change = F.pad(frame.diff(dim=1), (0, 0, 1, 0))
        speed = change[..., : place.shape[1]]
        bend = F.pad(speed[:, 1:].diff(dim=1), (0, 0, 1, 1))
        token = self.token(torch.cat((frame, oddest, 4 * change, 16 * speed, 16 * bend), dim=2))
        token = token + F.silu(self.local(token.transpose(1, 2)).transpose(1, 2)) + self.time
        for layer in self.mix:
            token = layer(token)
        return Reading.split(self.head(torch.cat((token.mean(1), token.amax(1)), dim=1)))


class FrameNetwork(_Frames):
    """Reads one frame: keypoints with the features there, edge strengths and layout. See ``sprites_image``."""

    outputs = (2, len(COLOURS), len(SHAPES))
    """Logits of blur and invalidity; then of the attributes that a frame shows."""

    def __init__(self, keypoints: int = 4, width: int = 96) -> None:
        super().__init__(keypoints)
        seen = 3 + self.seen
        self.head = nn.Sequential(
            nn.LayerNorm(seen), nn.Linear(seen, width), nn.GELU(), nn.Linear(width, sum(self.outputs))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of frames of levels 0..255, [n, H, W, 3]: defects [n, 2], colour [n, 5] and shape [n, 3]."""
        frames, level = _pixels(images.unsqueeze(1))
        _, there, layout, edges = self.look(frames)
        seen = torch.cat((level, there, edges, layout), dim=1)
        defects, colour, shape = self.head(seen).split(self.outputs, dim=1)
        return defects, colour, shape


NETWORKS: dict[str, type[nn.Module]] = {
    "reward": RewardNetwork,
    "judge": JudgeNetwork,
    "image": FrameNetwork,
}


def save_network(network: nn.Module, path: Path) -> None:
    """Write one of NETWORKS as half-precision safetensors with its kind in the metadata."""
    kinds = [kind for kind, cls in NETWORKS.items() if type(network) is cls]
    assert kinds, type(network)
    weights = {name: weight.half().contiguous() for name, weight in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path, {"config": json.dumps({"network": kinds[0]})})


def load_network(kind: str, path: Path | None = None) -> nn.Module:
    """Load a trained network, ``kind`` a key of NETWORKS, float32, in evaluation mode; from the package without a path.

    Raise FileNotFoundError naming the build command if the weights are missing, ValueError if the file holds
    another kind of network.
    """
    if path is None:
        source = resources.files("vpo_engine.data.sprites") / "weights" / f"{kind}.safetensors"
        if not source.is_file():
            raise FileNotFoundError(
                f"the sprites world has no {kind} weights at {source}; make them: {BUILD_COMMAND}"
            )
        with resources.as_file(source) as file:
            return load_network(kind, file)
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} weights at {path}; make them: {BUILD_COMMAND}")
    with safe_open(path, framework="pt") as archive:
        config = json.loads((archive.metadata() or {}).get("config", "{}"))
        weights = {name: archive.get_tensor(name).float() for name in archive.keys()}  # noqa: SIM118
    if config.get("network") != kind:
        raise ValueError(
            f"{path} holds network {config.get('network')!r}, expected {kind!r}; rebuild: {BUILD_COMMAND}"
        )
    network = NETWORKS[kind]()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
