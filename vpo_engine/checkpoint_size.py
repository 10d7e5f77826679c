"""The disk space and the host memory that a run's checkpoints need, known before its first step."""

from __future__ import annotations

import math
from pathlib import Path

from vpo_engine.config import Config
from vpo_engine.full_disk import disk_of, free_bytes
from vpo_engine.runs.disk_use import SPARE_BYTES
from vpo_engine.runs.gallery import most_clips
from vpo_engine.texts import counted
from vpo_engine.video_model import VideoModel

_GIB = 2**30


def checkpoint_bytes(config: Config, model: VideoModel) -> int:
    """Estimate the bytes of one checkpoint: the policy (or its adapter), its average, optimizer state, reference, and
    the base policy's clips that the report shows."""
    network = model.network
    trained = [p for p in network.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    weights = sum(p.numel() * p.element_size() for p in trained)
    policy = weights
    if config.model.lora is None:
        policy = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    moments = 8 * count if config.memory.optimizer_bits == 32 else 2.1 * count
    master = 4 * count if config.optimizer_memory.weights == "fp32_master" else 0
    reference = {"bf16": 2.0 * count, "int8": 1.1 * count, "exact8": 1.1 * count}.get(
        config.reference.storage, policy
    )
    if not config.card.reference:
        reference = 0.0
    average = 0 if config.ema.decay is None else policy - weights + 4 * count
    return int(policy + average + moments + master + reference) + _clip_bytes(config, model)


def _clip_bytes(config: Config, model: VideoModel) -> int:
    """Return the bytes of the shown clips, uint8; 0 for a model that does not tell its size."""
    return 0 if model.video_size is None else most_clips(config) * 3 * math.prod(model.video_size)


def check_disk(config: Config, model: VideoModel, root: Path) -> None:
    """Raise ValueError if the disk of the run directory ``root`` cannot hold the checkpoints of the run.

    One more than checkpoint.keep is there while the newest is written; those that are there already need no more.
    """
    size = checkpoint_bytes(config, model)
    present = len(list((root / "checkpoints").glob("step_*"))) if root.exists() else 0
    number = max(1, config.checkpoint.keep + 1 - present)
    place = disk_of(root)
    free = free_bytes(root)
    if free < number * size + SPARE_BYTES:
        raise ValueError(
            f"the disk of {place} has {free / _GIB:.2f} GiB free, but this run needs {number * size / _GIB:.2f} GiB "
            f"there for {counted(number, 'checkpoint')} of {size / _GIB:.2f} GiB "
            f"(checkpoint.keep={config.checkpoint.keep}, and the one that is being written); free "
            "some space, keep fewer, or give a run_dir on another disk"
        )


def check_host_memory(config: Config, model: VideoModel, available: int) -> None:
    """Raise ValueError if the copies of checkpoint.background=true do not fit into ``available`` bytes of the host."""
    size = checkpoint_bytes(config, model)
    if config.checkpoint.background and size > available:
        raise ValueError(
            f"checkpoint.background=true copies the run's state to host memory, which takes {size / _GIB:.2f} GiB, but "
            f"{available / _GIB:.2f} GiB are available; set checkpoint.background=false"
        )
