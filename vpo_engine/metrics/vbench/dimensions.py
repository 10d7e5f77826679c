"""The seven dimensions of VBench as metrics of videos.

Letters: F frames of H x W pixels, D channels of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.networks.checkpoints import read_state
from vpo_engine.metrics.provenance import hash_file
from vpo_engine.metrics.vbench import arithmetic, pixels
from vpo_engine.metrics.video_metric import Measurement, Record, VideoMetric, mean
from vpo_engine.metrics.weight_paths import find_weights
from vpo_engine.rewards.frames import batches
from vpo_engine.weights import load_strict

MEAN_OF_FRAMES = "mean over frames"
HEAD_FILE = "sa_0_4_vit_l_14_linear.pth"
_BATCH = 16
"""The frames that go through a network at once."""
KEPT_PER_PROMPT = 5
"""The still videos of each prompt that VBench's filter keeps for temporal flickering."""

Features = Callable[[Tensor], Tensor]
"""Turns normalised pixels [F, 3, h, w] into features [F, D]."""


class VbenchDimension(VideoMetric):
    """The base of the dimensions. Beside a number stands what the leaderboard makes of it."""

    def _aggregate(
        self, output: str, records: Sequence[Record]
    ) -> tuple[float | None, dict[str, float], list[str]]:
        value, others = self._combined([record.values[output] for record in records], records)
        scaled = arithmetic.normalised(self.card.dimension.replace("_", " "), value)
        return value, {**others, "on the leaderboard's scale": scaled}, []

    def _combined(self, values: Sequence[float], records: Sequence[Record]) -> tuple[float, dict[str, float]]:
        """Make one number of the values of the records; return it with further numbers, by name."""
        return mean(values), {}

    def video_result(self, record: Record) -> float | bool:
        """Return what VBench's own result file holds of a video under ``video_results``."""
        return record.values[""]


class _Consistency(VbenchDimension):
    """The likeness of each frame to the one before and to the first, by a network's features.

    As VBench in one process does, the mean is over the frames of all videos; that over videos, which VBench in several
    processes takes for subject consistency, is beside it.
    """

    aggregation = MEAN_OF_FRAMES

    def __init__(self, card: MetricCard, features: Features, *, device: torch.device, **facts: Any) -> None:
        super().__init__(card, **facts)
        self._features, self._device = features, device

    def _pixels(self, frames: Tensor) -> Tensor:
        raise NotImplementedError

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        parts = [
            self._features(self._pixels(video[rows].to(self._device))).cpu()
            for rows in batches(len(video), _BATCH)
        ]
        return Measurement({"": mean(arithmetic.frame_consistency(torch.cat(parts)))})

    def _combined(self, values: Sequence[float], records: Sequence[Record]) -> tuple[float, dict[str, float]]:
        steps = [record.frames - 1 for record in records]
        weighted = math.fsum(value * count for value, count in zip(values, steps, strict=True))
        return weighted / sum(steps), {"mean over videos": mean(values)}


class SubjectConsistency(_Consistency):
    """Consistency by DINO's features."""

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> SubjectConsistency:
        from vpo_engine.metrics.networks import vision_transformer as vit

        path = find_weights(weights, vit.DINO_FILE)
        state = read_state(path, vit.DINO)
        network = vit.DinoNetwork.from_weights(state, where=path, device=device)
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        _check_published(path, vit.DINO, {"width": (768, width), "patch": (16, patch)})
        return cls(card, network, device=device, backbone=vit.DINO, weights=_hashes(path))

    def _pixels(self, frames: Tensor) -> Tensor:
        return pixels.dino_pixels(frames)


class BackgroundConsistency(_Consistency):
    """Consistency by the features of CLIP ViT-B/32."""

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> BackgroundConsistency:
        features, facts = _clip(weights, "ViT-B/32", device)
        return cls(card, features, device=device, **facts)

    def _pixels(self, frames: Tensor) -> Tensor:
        return pixels.clip_pixels(frames)


class TemporalFlickering(VbenchDimension):
    """The likeness of neighbouring frames, of all videos that are given."""

    @classmethod
    def make(cls, card: MetricCard, weights: Path | None, device: torch.device) -> TemporalFlickering:
        return cls(card)

    @property
    def settings(self) -> dict[str, str]:
        return {"static filter": "off"}

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        return Measurement({"": arithmetic.flicker_score(video)})


class FilteredFlickering(VbenchDimension):
    """The likeness of neighbouring frames, of the videos that VBench's filter finds still.

    Of each prompt up to five are kept, the first by their names.
    """

    def __init__(self, card: MetricCard, flow: Callable[[Tensor, Tensor], Tensor], **facts: Any) -> None:
        super().__init__(card, **facts)
        self._flow = flow

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> FilteredFlickering:
        flow, facts = _raft(weights, device)
        return cls(card, flow, **facts)

    @property
    def settings(self) -> dict[str, str]:
        return {"static filter": f"on, up to {KEPT_PER_PROMPT} of each prompt"}

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        pairs = [*pairwise(video), (video[0], video[-1]), (video[-1], video[0])]
        strengths = [arithmetic.flow_strength(self._flow(*pair), arithmetic.TOP_OF_STATIC) for pair in pairs]
        static = arithmetic.is_static(strengths, video.shape[1], video.shape[2], len(video))
        return Measurement({"": arithmetic.flicker_score(video)}, {"static": static})

    def _chosen(self, good: Sequence[Record]) -> tuple[Sequence[Record], list[str]]:
        kept: dict[str, list[Record]] = {}
        for record in sorted(good, key=lambda record: record.video):
            if record.details["static"]:
                kept.setdefault(record.prompt, []).append(record)
        chosen = [record for records in kept.values() for record in records[:KEPT_PER_PROMPT]]
        notes = [f"VBench's filter of still videos kept {len(chosen)} of {len(good)}"]
        without = sorted({record.prompt for record in good} - set(kept))
        if without:
            notes.append(f"no video of {len(without)} prompts is still, for example {without[0]!r}")
        return chosen, notes


class MotionSmoothness(VbenchDimension):
    """The accuracy with which an interpolating network predicts frames from their neighbours, at full size."""

    def __init__(self, card: MetricCard, between: Callable[[Tensor, Tensor], Tensor], **facts: Any) -> None:
        """``between``: makes the frame between two, uint8 [H, W, 3]."""
        super().__init__(card, **facts)
        self._between = between

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> MotionSmoothness:
        from vpo_engine.metrics.networks import borrowed

        path = find_weights(weights, borrowed.AMT_FILE)
        between, backbone = borrowed.load_amt(path, device)
        return cls(card, between, backbone=backbone, weights=_hashes(path))

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        made = [self._between(*pair) for pair in pairwise(video[::2])]
        return Measurement({"": arithmetic.foretold_score(video[1::2], made)})


class ShareOfMoving(VideoMetric):
    """The share of videos that move, by an optical flow over eight frames per second."""

    aggregation = "share of dynamic videos"

    def __init__(self, card: MetricCard, flow: Callable[[Tensor, Tensor], Tensor], **facts: Any) -> None:
        """``flow``: gives the motion [2, H', W'] between two frames, uint8 [H, W, 3]."""
        super().__init__(card, **facts)
        self._flow = flow

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        kept = video[:: arithmetic.frame_interval(fps)]
        height, width = video.shape[1:3]
        if len(kept) < 2:
            raise ValueError(
                f"only {len(kept)} of the video's {len(video)} frames is kept at {fps:g} fps, where dynamic degree "
                f"looks at {arithmetic.RATE} frames per second; give longer videos"
            )
        strengths: list[float] = []
        for pair in pairwise(kept):
            strengths.append(arithmetic.flow_strength(self._flow(*pair)))
            if arithmetic.is_dynamic(strengths, height, width, len(kept)):
                break
        dynamic = arithmetic.is_dynamic(strengths, height, width, len(kept))
        return Measurement({"": float(dynamic)}, {"flow": strengths, "kept frames": len(kept)})


class DynamicDegree(ShareOfMoving, VbenchDimension):
    """The share of moving videos by RAFT's flow."""

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> DynamicDegree:
        flow, facts = _raft(weights, device)
        return cls(card, flow, **facts)

    def video_result(self, record: Record) -> bool:
        return bool(record.values[""])


class AestheticQuality(VbenchDimension):
    """LAION's linear aesthetic head on the features of CLIP ViT-L/14, a tenth of its rating."""

    def __init__(
        self, card: MetricCard, features: Features, head: nn.Linear, *, device: torch.device, **facts: Any
    ) -> None:
        super().__init__(card, **facts)
        self._features, self._head, self._device = features, head, device

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> AestheticQuality:
        features, facts = _clip(weights, "ViT-L/14", device)
        path = find_weights(weights, HEAD_FILE)
        facts["weights"] |= _hashes(path)
        facts["backbone"] += " and LAION's linear head"
        head = head_from_weights(read_state(path, "LAION's linear aesthetic head"), where=path)
        return cls(card, features, head.to(device), device=device, **facts)

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        ratings: list[float] = []
        for rows in batches(len(video), _BATCH):
            found = self._features(pixels.clip_pixels(video[rows].to(self._device)))
            ratings += aesthetic_ratings(self._head, found).tolist()
        return Measurement({"": mean(ratings) / 10})


def head_from_weights(weights: dict[str, Tensor], *, where: str | Path = "the state dict") -> nn.Linear:
    """Make LAION's linear head. Raise ValueError for another head, such as the one of several layers."""
    with torch.device("meta"):
        head = nn.Linear(768, 1)
    remedy = f"give the file {HEAD_FILE} of LAION-AI/aesthetic-predictor; the head of sac+logos+ava1 is another one"
    load_strict(head, weights, where=where, model="LAION's linear head", remedy=remedy, dtype=torch.float32)
    return head.eval().requires_grad_(False)


def aesthetic_ratings(head: nn.Linear, features: Tensor) -> Tensor:
    """Return ratings around 1 to 10, float32 [F], of features [F, 768]."""
    return head(F.normalize(features.float(), dim=-1)).squeeze(-1)


class ImagingQuality(VbenchDimension):
    """MUSIQ's score of frames, trained on SPAQ, a hundredth of it."""

    def __init__(
        self, card: MetricCard, score: Callable[[Tensor], Tensor], *, device: torch.device, **facts: Any
    ) -> None:
        """``score``: gives the scores of images [1, 3, h, w] in 0..1, around 0 to 100."""
        super().__init__(card, **facts)
        self._score, self._device = score, device

    @classmethod
    def make(cls, card: MetricCard, weights: Path, device: torch.device) -> ImagingQuality:
        from vpo_engine.metrics.networks import borrowed

        path = find_weights(weights, borrowed.MUSIQ_FILE)
        score, backbone = borrowed.load_musiq(path, device)
        return cls(card, score, device=device, backbone=backbone, weights=_hashes(path))

    @property
    def settings(self) -> dict[str, str]:
        return {"preprocessing": "longer"}

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        raw = mean([float(self._score(image)) for image in self._images(video)])
        return Measurement({"": raw / 100}, {"raw": raw})

    def _images(self, video: Tensor) -> Iterable[Tensor]:
        return (pixels.imaging_pixels(frame[None].to(self._device)) for frame in video)

    def video_result(self, record: Record) -> float:
        return float(record.details["raw"])


def _clip(weights: Path, size: str, device: torch.device) -> tuple[Features, dict[str, Any]]:
    """Return CLIP's image features, and what is known of the network. ``size``: ViT-B/32 or ViT-L/14."""
    from vpo_engine.metrics.networks import clip_vision

    name = f"CLIP {size}"
    width, patch, archive = {
        "ViT-B/32": (768, 32, clip_vision.B32_FILE),
        "ViT-L/14": (1024, 14, clip_vision.L14_FILE),
    }[size]
    path = find_weights(weights, archive)
    if path.is_dir():
        network = clip_vision.clip_from_folder(path, name=name, device=device)
        files = sorted([*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")])
    else:
        state = read_state(path, name)
        network = clip_vision.clip_from_weights(state, name=name, where=path, device=device)
        files = [path]
    config = network.config
    _check_published(path, name, {"width": (width, config.hidden_size), "patch": (patch, config.patch_size)})
    facts = {"backbone": name, "weights": _hashes(*files)}
    return lambda found: network(found).image_embeds, facts


def _raft(weights: Path, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]:
    """Return RAFT's flow between two frames, and what is known of the network."""
    from vpo_engine.metrics.networks import raft

    path = find_weights(weights, raft.FILE)
    network = raft.Raft.from_weights(read_state(path, raft.NAME), where=path, device=device)
    facts = {"backbone": raft.NAME, "weights": _hashes(path)}
    return lambda before, after: raft.frame_flow(network, before, after), facts


def _check_published(path: Path, network: str, sizes: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError where a size of the network is not the published one: (published, found) by name."""
    different = [
        f"{name} {found}, not {wanted}" for name, (wanted, found) in sizes.items() if wanted != found
    ]
    if different:
        raise ValueError(
            f"{path} is a network like {network}, but of another size ({', '.join(different)}), so its numbers would "
            f"not be VBench's; give the weights of {network}"
        )


def _hashes(*files: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in files}
