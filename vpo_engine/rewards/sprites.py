"""The sprites world's reward network and its judge, with VideoScore's five dimensions on its scale of 1 to 4.

Either network reads, from the pixels alone, the severity of each kind of damage, whether there is a sprite
clip at all ("valid"), and the sprite's attributes. The dimensions (4 is best) are put together from these readings:

    visual_quality        1 + 3 valid (1 - blur)
    temporal_consistency  1 + 3 valid (1 - flicker) (1 - jitter)
    dynamic_degree        1 + 3 valid (1 - freeze)
    text_alignment        1 + 3 valid (mean probability of the caption's colour, shape and direction)
    factual_consistency   1 + 3 valid (1 - identity)

so a destroyed clip is low in all of them. The policy is trained against ``SpritesReward``; ``SpritesJudge``
has another architecture, seed and training data, and nothing is ever optimised against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpo_engine.data.sprites.world import FRAMES, SIZE, Attributes, parse_caption
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import check_video_pixels
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.sprites_networks import BUILD_COMMAND, Reading, load_network
from vpo_engine.rewards.videos import Videos, whole

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_alignment",
    "factual_consistency",
)
CARD = RewardCard(
    name="sprites",
    dimensions=dict.fromkeys(DIMENSIONS, (1.0, 4.0)),
    frames=f"{FRAMES}, all",
    resolution=f"{SIZE} x {SIZE}; video files of enlarged clips are averaged down to it",
    reads_prompt=True,
    differentiable=True,
    parameters=254_210,
    licence="the engine's own",
    source="vpo_engine/data/sprites/weights",
)
CHUNK = 64
"""Clips per forward."""


def dimensions_of(severities: Tensor, valid: Tensor, match: Tensor) -> dict[str, Tensor]:
    """Compute the five dimensions, 1..4, from severities [B, 5], validity [B] and caption match [B], all in 0..1."""
    flicker, jitter, blur, identity, freeze = severities.unbind(1)
    quality = (1 - blur, (1 - flicker) * (1 - jitter), 1 - freeze, match, 1 - identity)
    return {name: 1 + 3 * valid * part for name, part in zip(DIMENSIONS, quality, strict=True)}


def score_reading(reading: Reading, attributes: Attributes) -> dict[str, Tensor]:
    """Compute the five dimensions of a reading, given the attributes in the captions."""
    defects = reading.defects.sigmoid()
    parts = (
        (reading.colour, attributes.colour),
        (reading.shape, attributes.shape),
        (reading.direction, attributes.direction),
    )
    match = sum(
        (logits.softmax(1).gather(1, index.unsqueeze(1)).squeeze(1) for logits, index in parts),
        start=torch.zeros_like(defects[:, 0]),
    )
    return dimensions_of(defects[:, :5], 1 - defects[:, 5], match / 3)


def _check(videos: Videos, prompts: Sequence[str]) -> None:
    """Raise ValueError unless ``videos`` are clips of the sprites world with a prompt each."""
    if videos.dtype != torch.uint8:
        raise ValueError(f"videos are {videos.dtype}, expected torch.uint8 levels 0..255")
    _check_size(videos)
    if len(prompts) != videos.shape[0]:
        raise ValueError(f"{len(prompts)} prompts for {videos.shape[0]} videos; give one caption a video")


def _check_size(videos: Videos) -> None:
    if videos.ndim != 5 or tuple(videos.shape[1:]) != (FRAMES, SIZE, SIZE, 3) or not videos.shape[0]:
        raise ValueError(
            f"videos have shape {tuple(videos.shape)}, expected [B, {FRAMES}, {SIZE}, {SIZE}, 3], B >= 1: "
            "this reward scores clips of the sprites world only"
        )


class _SpritesScorer:
    """Scores clips with one of the networks. Deterministic for the same videos in the same batch."""

    dimensions = DIMENSIONS
    kind: str

    def __init__(self, network: nn.Module | None = None) -> None:
        """``network``: a trained one; without it the package's weights are loaded."""
        self.network = load_network(self.kind) if network is None else network

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it is no caption of the sprites world."""
        return refusal(parse_caption, prompt)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        if (frames, height, width) == (FRAMES, SIZE, SIZE):
            return None
        return f"this reward scores clips of the sprites world only, {FRAMES} frames of {SIZE} x {SIZE}"

    @torch.no_grad()
    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 [B, 17, 32, 32, 3] and B captions: {dimension: float32 [B] in 1..4}, on the CPU.

        Raise ValueError for another shape or type, for a text that is no caption of the sprites world, and for
        a score that is not finite.
        """
        _check(videos, prompts)
        return {name: values.cpu() for name, values in self._scores(videos, prompts).items()}

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, 17, 3, 32, 32] in 0..1: {dimension: [B] in 1..4} on their device, with gradients.

        Of pixels that are whole 255ths the scores are those of ``score`` but for rounding. Nothing is rounded to bytes
        and nothing is clamped. Raise ValueError as ``score`` does.
        """
        check_video_pixels(videos, prompts)
        _check_size(videos.movedim(2, 4))
        return self._scores(videos.movedim(2, 4) * 255, prompts)

    def _scores(self, levels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score levels 0..255 of clips, [B, 17, 32, 32, 3]: {dimension: [B]} on the network's device."""
        attributes = Attributes.of(prompts)
        device = next(self.network.parameters()).device
        parts = []
        for start in range(0, len(prompts), CHUNK):
            rows = slice(start, start + CHUNK)
            reading = self.network(levels[rows].to(device))
            parts.append(torch.stack([*score_reading(reading, attributes[rows].to(device)).values()]))
        scores = dict(zip(DIMENSIONS, torch.cat(parts, dim=1).unbind(0), strict=True))
        for name, values in scores.items():
            if not bool(values.isfinite().all()):
                row = int((~values.isfinite()).nonzero()[0])
                raise ValueError(
                    f"the {self.kind} network gave {name} = {values[row].item()} for video {row} "
                    f"({prompts[row]!r}); its weights are damaged: rebuild them with {BUILD_COMMAND}"
                )
        return scores


class SpritesReward(_SpritesScorer):
    """The reward the sprites world's policy is trained against (a ``Reward``)."""

    kind = "reward"


class SpritesJudge(_SpritesScorer):
    """The held-out judge (a ``Reward``), never optimised against."""

    kind = "judge"


class SpritesOfFiles(SpritesReward):
    """``SpritesReward`` for clips from video files, in which each pixel may have become a square of pixels."""

    @classmethod
    def from_pretrained(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SpritesOfFiles:
        """Make the scorer with the package's weights, in float32 whatever the ``dtype``."""
        del dtype
        return cls(load_network(cls.kind).to(device))

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size get no score: a side may be any multiple of the world's."""
        enlarged = height == width and height % SIZE == 0
        return super().refuse_size(frames, SIZE if enlarged else height, SIZE if enlarged else width)

    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score as ``SpritesReward.score`` does, also videos [B, 17, 32 n, 32 n, 3] for a whole number n."""
        if not _of_squares(videos.shape):
            _check(videos, prompts)
        clips = whole(videos)
        if clips.shape[2] > SIZE:
            squares = clips.unflatten(3, (SIZE, -1)).unflatten(2, (SIZE, -1))  # [B, F, SIZE, n, SIZE, n, 3]
            clips = squares.float().mean(dim=(3, 5)).round().to(clips.dtype)
        return super().score(clips, prompts)

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score as ``SpritesReward.score_pixels`` does, also videos [B, 17, 3, 32 n, 32 n] for a whole number n."""
        check_video_pixels(videos, prompts)
        if _of_squares(videos.movedim(2, 4).shape) and videos.shape[3] > SIZE:
            videos = videos.unflatten(4, (SIZE, -1)).unflatten(3, (SIZE, -1)).mean(dim=(4, 6))
        return super().score_pixels(videos, prompts)


def _of_squares(shape: torch.Size) -> bool:
    """Return whether clips of this shape can be made smaller to those of the sprites world."""
    return len(shape) == 5 and shape[1] == FRAMES and shape[2] == shape[3] and shape[2] % SIZE == 0
