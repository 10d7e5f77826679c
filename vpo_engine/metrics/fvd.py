"""The Frechet video distance: how far the features of a set of videos are from those of reference videos.

Content-debiased FVD (Ge et al., arXiv 2404.12391) takes VideoMAE's features; the older one takes I3D's logits. Of each
video the first 16 frames are looked at, so that a number can be made again; cd-fvd draws a clip at random.

Letters: F frames of H x W pixels, D channels of a feature.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_engine.data.clips import is_hidden
from vpo_engine.metrics.frechet import FeatureSums, frechet_distance
from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.networks.checkpoints import read_state
from vpo_engine.metrics.provenance import hash_file
from vpo_engine.metrics.video_metric import Measurement, Record, VideoMetric
from vpo_engine.metrics.weight_paths import find_weights
from vpo_engine.runs.video_file import VideoFile

FRAMES, RESOLUTION = 16, 256
_SIDE = 224
"""The pixels of the squares that both networks take."""
_VIDEOS = (".avi", ".mp4", ".webm", ".mov", ".mkv", ".m4v")

Features = Callable[[Tensor], Tensor]
"""Turns a clip, uint8 [F, H, W, 3], into its feature, float32 [D]."""


class Fvd(VideoMetric):
    """A distance of the measured videos to reference videos. One video has no distance, so records hold features."""

    aggregation = "Frechet distance of all videos"

    def __init__(
        self,
        card: MetricCard,
        features: Features,
        width: int,
        reference: Path,
        *,
        backbone: str,
        weights: dict[str, str],
    ) -> None:
        """``width``: the channels of a feature. ``reference``: a folder of videos, or an .npz file of their sums.

        The videos are measured at once. Raise ValueError, with what to do, for a reference that is neither, has fewer
        than two videos, or a video that cannot be read or is too short.
        """
        super().__init__(card, backbone=backbone, weights=weights)
        self._features, self._width, self._path = features, width, reference
        self.reference = self._measured(reference) if reference.is_dir() else self._read(reference)
        self._digest = _digest(self.reference)

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device, *, reference: Path) -> Fvd:
        """Make the metric of the network that the card names first among its files."""
        load = {"fvd_videomae": _videomae, "fvd_i3d": _i3d}[card.name]
        features, width, backbone, path = load(weights, device)
        return cls(card, features, width, reference, backbone=backbone, weights={path.name: hash_file(path)})

    @property
    def settings(self) -> dict[str, str]:
        return {
            "clip": f"first {FRAMES} frames",
            "resolution": f"shorter side {RESOLUTION}, centre crop",
            "reference": f"{self._path.name}, {self.reference.count} videos",
            "reference SHA-256": self._digest,
        }

    def refuse_count(self, count: int) -> str | None:
        if count < 2:
            return f"{self.card.name} needs at least 2 videos, there are {count}; give more, or leave this metric out"
        return None

    def _measured(self, folder: Path) -> FeatureSums:
        """Return the sums of the features of a folder's videos."""
        sums = FeatureSums.empty(self._width)
        for path in reference_files(folder):
            file = VideoFile.open(path)
            if reason := self.refuse_size(*file.shape[1:4]):
                raise ValueError(f"reference video '{path}': {reason}")
            sums.add(self._feature(file[:, :][0])[None])
        return sums

    @torch.inference_mode()
    def _feature(self, video: Tensor) -> np.ndarray:
        clip = prepared_clip(video, RESOLUTION, FRAMES)
        return self._features((clip * 255).to(torch.uint8).permute(1, 2, 3, 0)).float().cpu().numpy()

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        feature = self._feature(video)
        if not np.isfinite(feature).all():
            raise ValueError(f"{self.backbone} gave a feature that is not finite; fetch its weights again")
        return Measurement({}, {"feature": base64.b64encode(feature.astype("<f4").tobytes()).decode()})

    def _aggregate(
        self, output: str, records: Sequence[Record]
    ) -> tuple[float | None, dict[str, float], list[str]]:
        count = len(records)
        if reason := self.refuse_count(count):
            return None, {}, [reason]
        rows = [np.frombuffer(base64.b64decode(each.details["feature"]), dtype="<f4") for each in records]
        distance = frechet_distance(self.reference, FeatureSums.of(np.stack(rows)))
        counts = {"videos": float(count), "reference videos": float(self.reference.count)}
        return distance, counts, _count_notes(count, self.reference.count, self._width + 1)

    def _read(self, path: Path) -> FeatureSums:
        if not path.exists():
            raise FileNotFoundError(
                f"there is no reference at {path}; give a folder of videos or an .npz file"
            )
        sums = FeatureSums.read(path)
        if len(sums.total) != self._width:
            raise ValueError(
                f"{path} holds features of {len(sums.total)} channels, and those of {self.backbone} have "
                f"{self._width}; give the reference of this network"
            )
        if sums.count < 2:
            raise ValueError(f"{path} is made of {sums.count} videos, expected at least 2; make it of more")
        return sums


def _digest(sums: FeatureSums) -> str:
    """Return the SHA-256 of sums."""
    digest = hashlib.sha256(str(sums.count).encode())
    for array in (sums.total, sums.products):
        digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()


def reference_files(folder: Path) -> list[Path]:
    """Return the video files under a folder, without hidden ones. Raise ValueError for fewer than two."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _VIDEOS)
    files = [path for path in found if not is_hidden(path.relative_to(folder).as_posix())]
    if len(files) < 2:
        raise ValueError(
            f"{folder} has {len(files)} videos ({', '.join(_VIDEOS)}), and a Frechet distance needs at least 2 as the "
            "reference; give a folder with more, 1,409 or better 2,048"
        )
    return files


def prepared_clip(video: Tensor, resolution: int, frames: int | None = None, step: int = 1) -> Tensor:
    """Return the clip that cd-fvd makes of a video, float32 [3, T, resolution, resolution] in 0..1.

    The first ``frames`` frames are taken, then every ``step``-th of them; the shorter side becomes ``resolution``,
    bilinear with antialiasing, and the middle is kept. Raise ValueError for fewer frames.
    """
    if frames is not None and len(video) < frames:
        raise ValueError(f"the video has {len(video)} frames, expected at least {frames}; give longer videos")
    images = video[:frames:step].permute(0, 3, 1, 2).float() / 255
    height, width = images.shape[2:]
    scale = resolution / min(height, width)
    size = (
        (resolution, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), resolution)
    )
    images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    top, left = ((length - resolution) // 2 for length in images.shape[2:])
    return images[:, :, top : top + resolution, left : left + resolution].permute(1, 0, 2, 3).contiguous()


def videomae_pixels(clips: Tensor) -> Tensor:
    """Return what VideoMAE takes, float32 [B, 3, T, 224, 224] in 0..1, of clips, uint8 [B, T, H, W, 3]: squashed."""
    images = clips.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    return _squashed(images).unflatten(0, clips.shape[:2]).transpose(1, 2)


def i3d_pixels(clips: Tensor) -> Tensor:
    """Return what I3D takes, float32 [B, 3, T, 224, 224] in -1..1, of clips, uint8 [B, T, H, W, 3]: squashed."""
    images = _squashed(clips.flatten(0, 1).permute(0, 3, 1, 2).float())
    return (2 * images / 255 - 1).unflatten(0, clips.shape[:2]).transpose(1, 2)


def _squashed(images: Tensor) -> Tensor:
    return F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", align_corners=False)


def _videomae(weights: Path, device: torch.device) -> tuple[Features, int, str, Path]:
    from vpo_engine.metrics.networks import vision_transformer as vit

    path = find_weights(weights, vit.VIDEOMAE_FILE)
    state = read_state(path, vit.VIDEOMAE, ("model", "module"))
    network = vit.VideoMaeNetwork.from_weights(state, where=path, device=device)
    width = state["patch_embed.proj.weight"].shape[0]
    return lambda clip: network(videomae_pixels(clip[None].to(device)))[0], width, vit.VIDEOMAE, path


def _i3d(weights: Path, device: torch.device) -> tuple[Features, int, str, Path]:
    from vpo_engine.metrics.networks import i3d

    path = find_weights(weights, i3d.FILE)
    network = i3d.I3d.from_weights(read_state(path, i3d.NAME), where=path, device=device)
    return lambda clip: network(i3d_pixels(clip[None].to(device)))[0], i3d.LOGITS, i3d.NAME, path


def _count_notes(count: int, reference: int, least: int) -> list[str]:
    """Return a sentence about how many videos the distance is made of, and one more where they are too few."""
    notes = [f"made of {count} videos and {reference} reference videos"]
    if count < least:
        notes.append(
            f"with fewer than {least} videos the covariance is singular, and the distance is too large: compare it "
            "only with one of as many videos"
        )
    return notes
