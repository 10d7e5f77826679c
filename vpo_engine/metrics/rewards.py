"""Every reward model as a metric of videos: a value for each of its dimensions, averaged over videos."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpo_engine.metrics.metric_card import MetricCard
from vpo_engine.metrics.provenance import hash_file
from vpo_engine.metrics.video_metric import Measurement, VideoMetric
from vpo_engine.rewards.kinds import find_entry, is_own
from vpo_engine.rewards.own import own_class, own_parameters
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.registry import build_reward, knows_frame_rate, made_for_one_rate, reward_card
from vpo_engine.rewards.videos import FileReward

_OF_VIDEOALIGN = ("checkpoint-*/*.safetensors", "checkpoint-*/*.pth", "model_config.json")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.pth.tar", *_OF_VIDEOALIGN)
"""Files whose content decides the scores. Not all below the folder: below the sprites' own lies their policy."""
_SOURCES = Path(__file__).parents[2]
"""The folder that the package lies in, from which cards name the weights that come with it."""


def card_of_reward(name: str, kind: str) -> MetricCard:
    """Return the card of a reward as a metric called ``name``. Raise ValueError for an unknown kind."""
    card = reward_card(kind)
    return MetricCard(
        name=name,
        group="reward",
        title=kind.replace("_", " "),
        measures=f"The score of the reward {kind}: {', '.join(card.dimensions)}.",
        needs=("its weights",) if _reads_a_folder(kind) else (),
        source=card.source,
        licence=card.licence,
        reads_prompt=card.reads_prompt,
    )


def _reads_a_folder(kind: str) -> bool:
    """Return whether the reward has its weights in a folder of the user's."""
    return "path" in own_parameters(kind) if is_own(kind) else not find_entry(kind).shipped


class RewardMetric(VideoMetric):
    """A reward model as a metric, in float32, with the reward's own choice of frames."""

    def __init__(
        self,
        card: MetricCard,
        kind: str,
        folder: Path | None,
        device: torch.device,
        weights: Mapping[str, str],
    ) -> None:
        """``kind`` and ``folder``: as for ``build_reward``. ``weights``: {file: SHA-256}."""
        super().__init__(card, backbone=f"{kind} ({card.source})", weights=weights)
        self._kind, self._folder, self._device = kind, folder, device
        self._one_rate = made_for_one_rate(kind)
        self._by_rate = knows_frame_rate(kind)  # then the reward refuses sizes by the rate of its first video
        self._fps: float | None = None
        self._reward: FileReward | None = None if knows_frame_rate(kind) else self._build(None)
        self.outputs = tuple(reward_card(kind).dimensions)

    @classmethod
    def of_kind(cls, card: MetricCard, kind: str, folder: Path | None, device: torch.device) -> RewardMetric:
        """Make the metric of a reward; errors are those of ``build_reward``."""
        hashes = _hashes(card, folder)
        if is_own(kind) and (code := inspect.getsourcefile(own_class(kind))) is not None:
            hashes[Path(code).name] = hash_file(Path(code))
        return cls(card, kind, folder, device, hashes)

    def _build(self, fps: float | None) -> FileReward:
        return build_reward(self._kind, self._folder, device=self._device, fps=fps)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        reason = None
        if self._reward is not None and not self._by_rate:
            reason = size_refusal(self._reward, frames, height, width)
        return reason or super().refuse_size(frames, height, width)

    def _measure(self, video: Tensor, prompt: str, fps: float) -> Measurement:
        if self._reward is None:
            self._reward, self._fps = self._build(fps), fps
        if self._one_rate and self._fps != fps:
            raise ValueError(
                f"{self.card.name} is made for one frame rate, {self._fps:g} of its first video, and this one has "
                f"{fps:g}; measure videos of one rate at a time"
            )
        of_this_rate = fps == self._fps or not self._by_rate
        reason = size_refusal(self._reward, *video.shape[:3]) if of_this_rate else None
        if reason := reason or refusals(self._reward, [prompt]).get(0):
            raise ValueError(reason)
        scores = self._reward.score(_Clip(video[None], fps), [prompt])
        return Measurement({name: float(scores[name][0]) for name in self.outputs})


class _Clip:
    """One video in memory that knows its frame rate, as rewards take a video file (``rewards.videos.File``)."""

    ndim, dtype = 5, torch.uint8

    def __init__(self, videos: Tensor, fps: float) -> None:
        self._videos, self.fps = videos, fps
        self.shape, self.device = videos.shape, videos.device

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: tuple[slice | Tensor, Sequence[int] | Tensor | slice]) -> Tensor:
        return self._videos[key]

    def to_fields(self) -> dict[str, Any]:
        raise AssertionError("a video in memory is scored in this process")


def _hashes(card: MetricCard, folder: Path | None) -> dict[str, str]:
    """Return {file: SHA-256} of a reward's weights: of its folder, or of the one in the package."""
    place = folder if card.needs else _SOURCES / card.source
    if place is None or not place.is_dir():
        return {}
    files = sorted({path for pattern in _WEIGHT_FILES for path in place.glob(pattern)})
    return {path.relative_to(place).as_posix(): hash_file(path) for path in files}
