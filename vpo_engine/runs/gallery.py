"""Galleries of clips for the report: lossless safetensors files with captions and scores in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.full_disk import write_whole
from vpo_engine.texts import parse_json

Scores = list[dict[str, float]]

MOST_CLIPS = 16
"""The most held-out clips that a report shows."""
_KEY = "gallery"
_LARGEST = 1e100


def most_clips(config: Config) -> int:
    """Return the most held-out clips that the report of a run shows; it has fewer if its file has fewer prompts."""
    prompts, samples = config.evaluation.prompts, config.evaluation.samples_per_prompt
    return MOST_CLIPS if prompts is None else min(MOST_CLIPS, prompts * samples)


@dataclass(frozen=True)
class HeldOutGallery:
    """Held-out clips of the base policy and of the trained one, sampled from the same prompts and noise."""

    before: Tensor
    """uint8 [M, F, H, W, 3]."""
    after: Tensor
    """uint8 [M, F, H, W, 3]."""
    prompts: list[str]
    before_scores: Scores
    """M times {dimension: score}."""
    after_scores: Scores
    fps: int
    settings: str
    """A sentence about how the clips were sampled."""


@dataclass(frozen=True)
class PairGallery:
    """Pairs that were trained on in one step."""

    winner: Tensor
    """uint8 [p, F, H, W, 3]."""
    loser: Tensor
    """uint8 [p, F, H, W, 3]."""
    prompts: list[str]
    winner_scores: Scores
    loser_scores: Scores
    gap: list[float]
    fps: int


def write_held_out(path: Path, gallery: HeldOutGallery) -> None:
    details = {
        "prompts": gallery.prompts,
        "before": gallery.before_scores,
        "after": gallery.after_scores,
        "fps": gallery.fps,
        "settings": gallery.settings,
    }
    _write(path, {"before": gallery.before, "after": gallery.after}, details)


def read_held_out(path: Path) -> HeldOutGallery:
    clips, details = _read(path, ("before", "after"))
    return HeldOutGallery(
        clips["before"],
        clips["after"],
        details["prompts"],
        details["before"],
        details["after"],
        details["fps"],
        details["settings"],
    )


def write_pairs(path: Path, gallery: PairGallery) -> None:
    details = {
        "prompts": gallery.prompts,
        "winner": gallery.winner_scores,
        "loser": gallery.loser_scores,
        "gap": gallery.gap,
        "fps": gallery.fps,
    }
    _write(path, {"winner": gallery.winner, "loser": gallery.loser}, details)


def read_pairs(path: Path) -> PairGallery:
    clips, details = _read(path, ("winner", "loser"))
    return PairGallery(
        clips["winner"],
        clips["loser"],
        details["prompts"],
        details["winner"],
        details["loser"],
        details["gap"],
        details["fps"],
    )


def pair_gaps(path: Path) -> list[float]:
    """Read the score gaps of a pair gallery, without its clips."""
    with safe_open(path, framework="pt") as file:
        gaps: list[float] = parse_json((file.metadata() or {})[_KEY])["gap"]
    _check_numbers(gaps)
    return gaps


def _write(path: Path, clips: dict[str, Tensor], details: dict[str, Any]) -> None:
    _check(str(path), clips, details)
    content = {name: clip.detach().cpu().contiguous() for name, clip in clips.items()}
    metadata = {_KEY: json.dumps(details, allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(content, metadata))


def _read(path: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _KEY not in metadata or set(file.keys()) != set(names):
            raise ValueError(f"'{path}' is not a gallery of {' and '.join(names)} clips of a run")
        clips = {name: file.get_tensor(name) for name in names}
    details = parse_json(metadata[_KEY])
    _check(str(path), clips, details)
    _check_types(details)
    return clips, details


def _check(where: str, clips: dict[str, Tensor], details: dict[str, Any]) -> None:
    """Check that every clip tensor is uint8 [M, F, H, W, 3] and that every list of the details has M entries."""
    shapes = {tuple(clip.shape) for clip in clips.values()}
    shape = shapes.pop()
    if shapes or len(shape) != 5 or shape[4] != 3 or any(c.dtype != torch.uint8 for c in clips.values()):
        found = ", ".join(f"{name} {clip.dtype} {list(clip.shape)}" for name, clip in clips.items())
        raise ValueError(
            f"gallery '{where}' needs uint8 clips [M, F, H, W, 3] of the same shape, got {found}"
        )
    for name, values in details.items():
        if isinstance(values, list) and len(values) != shape[0]:
            raise ValueError(f"gallery '{where}' has {shape[0]} clips but {len(values)} entries of '{name}'")


def _check_types(details: dict[str, Any]) -> None:
    """Raise TypeError or KeyError unless details read from a file have the types that a run writes."""
    if not all(isinstance(text, str) for text in (*details["prompts"], details.get("settings", ""))):
        raise TypeError("a prompt, or how the clips were sampled, is no text")
    _check_numbers([details["fps"], *details.get("gap", [])])
    for name in {"before", "after", "winner", "loser"} & details.keys():
        for scores in details[name]:
            _check_numbers(scores.values())


def _check_numbers(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not (isinstance(value, int | float) and abs(value) <= _LARGEST):
            raise TypeError(f"{value!r} is no number of a run")
