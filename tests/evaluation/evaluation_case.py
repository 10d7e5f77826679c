"""Small worlds for tests of evaluations: folders of sprites videos, and the commands that evaluate them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpo_engine import evaluate
from vpo_engine.runs.video import write_mp4

PROMPTS = (
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving down",
    "a white circle moving right",
)


def clip(brightness: int, number: int = 0, frames: int = 17, side: int = 32) -> Tensor:
    """Return a clip in which a bright square moves by a pixel a frame, uint8 [frames, side, side, 3]."""
    video = torch.full((frames, side, side, 3), 40, dtype=torch.uint8)
    for frame in range(frames):
        left = 2 + (frame + number) % 16
        video[frame, 8:18, left : left + 10] = torch.tensor([brightness, 60, 60], dtype=torch.uint8)
    return video


def videos(
    folder: Path, brightness: int, prompts: Sequence[str] = PROMPTS, count: int = 2, fps: float = 8
) -> Path:
    """Write ``count`` videos of each prompt in VBench's layout; a brighter folder has brighter squares."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        for index in range(count):
            frames = clip(brightness + 7 * number + 3 * index, number + index)
            write_mp4(folder / f"{prompt}-{index}.mp4", frames, fps, min_side=32)
    return folder


def run(*words: str | Path) -> int:
    """Call the command, and return its exit code."""
    return evaluate.main([str(word) for word in words])


def results_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return content
