"""The numbers of public metric code in tests/data/metrics, and the recipes by which their inputs are made."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "data" / "metrics"


@functools.cache
def facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def tensor(name: str, key: str) -> Tensor:
    return torch.from_numpy(arrays(name)[key])


def recipe_weights(shapes: Mapping[str, Sequence[int]], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Make weights under published names, as ``weights_recipe`` of model_forward.json says."""
    positions = facts("model_forward")["POS"]
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(tuple(shape), dtype=torch.int64)
            continue
        drawn = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
        if name.endswith("running_var"):
            drawn = 1 + 0.1 * np.abs(drawn)
        elif name.endswith("running_mean"):
            drawn = 0.1 * drawn
        elif any(part in name for part in positions):
            drawn = 0.2 * drawn
        elif len(shape) <= 1:
            drawn = 1 + 0.1 * drawn if name.endswith("weight") else 0.02 * drawn
        else:
            drawn = gain * drawn / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(drawn, dtype=np.float32))
    return weights


def smooth_video(seed: int, frames: int, height: int, width: int, dx: float = 2, dy: float = 1) -> Tensor:
    """Make a video of moving waves, uint8 [F, H, W, 3], as ``smooth_recipe`` of model_forward.json says."""
    draws = np.random.RandomState(seed)
    waves, phases = draws.uniform(0.03, 0.25, (6, 2)), draws.uniform(0, 2 * np.pi, (6, 3))
    sizes = draws.uniform(10, 30, (6, 3))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for time in range(frames):
        frame = np.full((height, width, 3), 127.5)
        for wave, phase, size in zip(waves, phases, sizes, strict=True):
            angle = wave[0] * (y - dy * time) + wave[1] * (x - dx * time)
            frame += size * np.sin(angle[..., None] + phase)
        video[time] = np.clip(np.rint(frame), 0, 255)
    return torch.from_numpy(video)
