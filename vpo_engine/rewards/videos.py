"""Videos as scorers take them: a tensor of all frames, or a file of which the frames that are looked at are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class File(Protocol):
    """A video file in place of uint8 videos [1, F, H, W, 3], which is ``runs.video_file.VideoFile``."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def fps(self) -> float:
        """Return the frames per second."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[slice | Tensor, Sequence[int] | Tensor | slice]) -> Tensor:
        """Return the frames that a tensor of all frames would give for this key."""
        ...

    def to_fields(self) -> dict[str, Any]:
        """Return everything that another process needs to read the same file, as plain values for JSON."""
        ...


Videos = Tensor | File
"""uint8 [B, F, H, W, 3]; a file is one video. Both give a tensor for ``videos[rows, frames]``."""


class FileReward(Protocol):
    """A ``Reward`` that also scores a video file, without reading the frames that it does not look at."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the names of what is scored."""
        ...

    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score videos for their B prompts: {dimension: float32 [B]}, higher is better."""
        ...


def whole(videos: Videos) -> Tensor:
    """Return all frames of the videos as a tensor."""
    return videos if isinstance(videos, Tensor) else videos[:, :]


def frame_rate(videos: Videos, fps: float) -> float:
    """Return the frames per second: the file's own, and ``fps`` for a tensor, which does not know its rate."""
    return fps if isinstance(videos, Tensor) else videos.fps
