"""The room that a run takes on its disk, part by part, known before its first step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_engine.checkpoint_size import checkpoint_bytes
from vpo_engine.config import Config
from vpo_engine.data.prompt_settings import count_prompts
from vpo_engine.data.sprites.world import withheld_captions
from vpo_engine.full_disk import free_bytes
from vpo_engine.run_gallery import MOST_PAIR_FILES, MOST_PAIRS
from vpo_engine.runs.disk_use import SPARE_BYTES, bytes_of
from vpo_engine.runs.gallery import most_clips
from vpo_engine.runs.tensorboard_clips import LARGEST_SIDE
from vpo_engine.texts import counted
from vpo_engine.video_model import VideoModel

_GIB = 2**30
_ROW_BYTES = 5_500
"""Bytes of a step in metrics.jsonl and in TensorBoard's files. Measured: 2.2 and 3.2 kB at 58 numbers a step."""
_PAIR_BYTES, _SCORE_BYTES = 400, 22
"""Bytes of a pair in the preference dataset with a prompt of common length, and of each of its scores."""
_SHOWN = 4
"""Videos of an evaluation that TensorBoard gets. An animated image has about a byte for each pixel."""


@dataclass(frozen=True)
class DiskPart:
    """A part of a run's files. grows: its bytes are of all steps; else they are there from early on.

    remedy: what makes it smaller.
    """

    name: str
    bytes: int
    grows: bool
    remedy: str


def disk_parts(config: Config, model: VideoModel) -> list[DiskPart]:
    """Return what the run directory will hold after the last step, the largest part first.

    ``model``: the configured one, also without weights. Latents and checkpoints are counted, the rest is estimated.
    """
    one, keep = checkpoint_bytes(config, model), config.checkpoint.keep
    parts = [
        DiskPart(
            f"checkpoints ({keep + 1} of {_size(one)})",
            (keep + 1) * one,
            False,
            f"lower checkpoint.keep={keep}",
        ),
        *_dataset(config, model),
        DiskPart("log", config.steps * _ROW_BYTES, True, f"lower steps={config.steps}"),
        *_videos(config, model),
    ]
    return sorted(parts, key=lambda part: -part.bytes)


def embedding_bytes(config: Config, model: VideoModel, prompts: int) -> int:
    """Return the most bytes that the text embeddings of a run with so many training prompts can take."""
    rule, item = model.text_rule, 2 if config.model.dtype == "bfloat16" else 4
    used = min(prompts, config.steps * config.pairs_per_step) + _held_out_prompts(config)
    return used * rule.max_tokens * rule.channels * item


def _held_out_prompts(config: Config) -> int:
    """Return the most held-out prompts that a run has; 0 if it takes all of a file that is not here."""
    file = config.prompts.held_out
    if config.evaluation.prompts is not None:
        return config.evaluation.prompts
    if file is None:
        return len(withheld_captions())
    return count_prompts(file, config.prompts.column) if file.is_file() else 0


def describe(config: Config, model: VideoModel, prompts: int) -> str:
    """Return the line of a plan about the disk."""
    parts = disk_parts(config, model)
    listed = ", ".join(f"{part.name} {_size(part.bytes)}" for part in parts)
    whole, text = sum(part.bytes for part in parts), _size(embedding_bytes(config, model, prompts))
    limit = "" if config.disk.limit_gib is None else f"; disk.limit_gib={config.disk.limit_gib:g}"
    return (
        f"disk: about {_size(whole)} after {counted(config.steps, 'step')}: {listed}; text embeddings, "
        f"which runs share, at most {text}{limit}"
    )


def as_json(config: Config, model: VideoModel, prompts: int) -> dict[str, Any]:
    """Return the plan of the disk for machines."""
    return {
        "parts": {part.name: part.bytes for part in disk_parts(config, model)},
        "text_embeddings_at_most": embedding_bytes(config, model, prompts),
    }


def check_run_fits(config: Config, model: VideoModel, root: Path, done: int) -> None:
    """Raise ValueError if the disk of the run directory ``root``, or disk.limit_gib, cannot hold the run to its end.

    done: the steps that the run directory has already; what grows is counted for the others.
    """
    left = (config.steps - done) / config.steps
    parts = [
        DiskPart(part.name, math.ceil(left * part.bytes), True, part.remedy) if part.grows else part
        for part in disk_parts(config, model)
    ]
    fixed = sum(part.bytes for part in parts if not part.grows)
    early = ("checkpoints", "gallery", *(("preference_dataset",) if config.samples_before else ()))
    fixed_here = sum(bytes_of(root / name) for name in early)
    more = sum(part.bytes for part in parts if part.grows) + max(0, fixed - fixed_here) + SPARE_BYTES
    free, limit = free_bytes(root), config.disk.limit_gib
    if more > free:
        remedy = "free some space, or give a run_dir on another disk"
        _refuse(f"the disk of {root} has {_gib(free)} free", more, parts, remedy)
    if limit is not None and (used := bytes_of(root)) + more > limit * _GIB:
        has = f", of which {_gib(used)} are taken" if used else ""
        _refuse(
            f"disk.limit_gib={limit:g} allows {_gib(limit * _GIB)}{has}", more, parts, "or raise the limit"
        )


def _refuse(room: str, more: int, parts: list[DiskPart], remedy: str) -> None:
    listed = ", ".join(f"{part.name} {_gib(part.bytes)}" for part in parts)
    largest = max(parts, key=lambda part: part.bytes)
    raise ValueError(
        f"{room}, but to its last step this run writes {_gib(more)} more ({listed}, and {_gib(SPARE_BYTES)} to spare); "
        f"{largest.remedy}, {remedy}"
    )


def _dataset(config: Config, model: VideoModel) -> list[DiskPart]:
    """Return the preference dataset's part, [] if the run keeps none."""
    kept, pairs, early = config.pairs.dataset, config.steps * config.pairs_per_step, config.samples_before
    if early:
        assert config.offline_dpo is not None
        kept, pairs = "latents", config.offline_dpo.pairs or pairs
    if kept == "none" or not config.card.candidates:
        return []
    scored = config.rollout.candidates * (1 + config.pairs.resample)
    each = _PAIR_BYTES + scored * _SCORE_BYTES * (1 + len(config.reward.dimensions))
    if kept == "latents":
        each += 2 * 4 * math.prod(model.latent_shape)
    less = "scores" if kept == "latents" else "none"
    remedy = f"lower offline_dpo.pairs={pairs}" if early else f"set pairs.dataset={less}"
    return [DiskPart("preference dataset", pairs * each, not early, remedy)]


def _videos(config: Config, model: VideoModel) -> list[DiskPart]:
    """Return the parts of galleries and of TensorBoard's clips; [] for a model that does not tell its size."""
    if model.video_size is None:
        return []
    frames, height, width = model.video_size
    every = config.evaluation.every
    evaluations = 2 + (0 if every is None else config.steps // every)
    # At the end both sides of the gallery stand beside each other.
    single, beside = _animated(height, width), _animated(height, 2 * width)
    shown = most_clips(config)
    clips = frames * (min(_SHOWN, shown) * evaluations * single + shown * beside)
    gallery = (2 * shown + 2 * MOST_PAIRS * MOST_PAIR_FILES) * 3 * frames * height * width
    return [
        DiskPart("clips in TensorBoard", clips, True, f"raise evaluation.every={every}"),
        DiskPart("galleries", gallery, False, "make smaller videos"),
    ]


def _animated(height: int, width: int) -> int:
    """Return the pixels of a frame in TensorBoard, where large ones are scaled down."""
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    return math.ceil(height * scale) * math.ceil(width * scale)


def _size(size: float) -> str:
    """Return a size in GiB, or in MiB where hundredths of a GiB would say nothing."""
    return _gib(size) if size >= _GIB / 20 else f"{size * 1024 / _GIB:.1f} MiB"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
