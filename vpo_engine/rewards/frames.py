"""Scorers of images on videos: the choice of frames, the one number made of their scores, and checks of inputs.

Letters: B videos (or images), F frames of a video, f frames of it that are scored, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from vpo_engine.rewards.refusals import refusal, refusals, size_refusal
from vpo_engine.rewards.videos import Videos

Reduce = Literal["mean", "min", "segments"]


class ImageScorer(Protocol):
    """A scorer of images, with one dimension. Deterministic; raises rather than returning a doubtful number."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the name of its one dimension."""
        ...

    @property
    def network(self) -> nn.Module:
        """Return the module that holds all its weights."""
        ...

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score uint8 images [B, H, W, 3] and their B prompts; return float32 [B] on the CPU; higher is better."""
        ...


class DifferentiableImageScorer(ImageScorer, Protocol):
    """An image scorer through which gradients reach the pixels."""

    def score_image_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score float images [B, 3, H, W] in 0..1 and their B prompts; return float32 [B] on the network's device."""
        ...


def batches(count: int, size: int) -> list[slice]:
    """Cut ``count`` inputs into slices of ``size``; the last one has what is left."""
    return [slice(start, start + size) for start in range(0, count, size)]


def counted_frames(count: int) -> str:
    """Return "1 frame", "2 frames" and so on."""
    return f"{count} frame" if count == 1 else f"{count} frames"


def spread_frames(num_frames: int, count: int | None) -> list[int]:
    """Return the middle frames of ``count`` equal parts of a video, or all frames if ``count`` is None or too many."""
    if count is None or count >= num_frames:
        return list(range(num_frames))
    return [(2 * part + 1) * num_frames // (2 * count) for part in range(count)]


def segment_frames(num_frames: int, segments: int, generator: torch.Generator | None = None) -> Tensor:
    """Return one frame from each of ``segments`` runs of ``num_frames // segments`` frames, int64 [S].

    With a ``generator`` (on the CPU) it is drawn, as InstructVideo does at every step; otherwise it is the middle
    one. The ``num_frames % segments`` frames at the end are in no segment. Raise ValueError for fewer frames than
    segments.
    """
    span = num_frames // segments
    if span == 0:
        raise ValueError(
            f"videos have {counted_frames(num_frames)} for {segments} segments; set segments to at most "
            f"{num_frames} (reward.frames)"
        )
    starts = span * torch.arange(segments)
    if generator is None:
        return starts + span // 2
    return starts + torch.randint(span, (segments,), generator=generator)


def segment_weights(indices: Tensor, num_frames: int, decay: float) -> Tensor:
    """Return exp(-decay |index - num_frames // 2|), float32, in the shape of ``indices``.

    This is InstructVideo's temporally attenuated reward (arXiv 2312.12490; ali-vilab/VGen, utils/reward/reward.py);
    its lambda is ``decay``; 0 weighs all frames alike.
    """
    return torch.exp(-decay * (indices - num_frames // 2).abs().float())


class VideoOfFrames:
    """An image scorer as a ``Reward`` of videos.

    mean, min: of the chosen frames' scores. segments: one frame of each segment is scored, the scores are weighed by
    their distance from the middle frame and averaged without dividing by the sum of weights, as in InstructVideo. Its
    decay of 1 is made for segments of 4 frames, of videos of 16; with longer ones it leaves weights near zero.
    """

    def __init__(
        self,
        scorer: ImageScorer,
        *,
        frames: int | None = None,
        reduce: Reduce = "mean",
        segments: int = 4,
        decay: float | None = None,
        batch_size: int = 64,
    ) -> None:
        """``frames`` frames are scored, evenly spread, or all for None.

        ``segments`` and ``decay`` are of reduce="segments" only; a decay of None is 4 over the frames of a segment,
        which is InstructVideo's 1 at its own sizes. ``batch_size`` is how many images a call of the scorer takes, of
        one or several videos.
        """
        for name, value in (("frames", frames), ("segments", segments), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if reduce not in get_args(Reduce):
            raise ValueError(f"reduce is {reduce!r}, expected one of {', '.join(get_args(Reduce))}")
        if reduce == "segments" and frames is not None:
            raise ValueError(
                f"frames is {frames}, but reduce='segments' scores one frame a segment; set segments instead"
            )
        if decay is not None and not 0 <= decay < float("inf"):
            raise ValueError(f"decay is {decay}, expected a finite number of at least 0")
        if len(scorer.dimensions) != 1:
            raise ValueError(
                f"{type(scorer).__name__} has dimensions {scorer.dimensions}, expected exactly one"
            )
        self.scorer, self.frames, self.reduce = scorer, frames, reduce
        self.segments, self.decay, self.batch_size = segments, decay, batch_size

    @property
    def dimensions(self) -> tuple[str, ...]:
        return tuple(self.scorer.dimensions)

    @property
    def network(self) -> nn.Module:
        return self.scorer.network

    def refusals(self, prompts: Sequence[str]) -> dict[int, str]:
        """Return why the scorer refuses prompts, by their number."""
        return refusals(self.scorer, prompts)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        too_short = refusal(segment_frames, frames, self.segments) if self.reduce == "segments" else None
        return too_short or size_refusal(self.scorer, 1, height, width)

    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3] and B prompts; return {dimension: float32 [B]}, on the CPU.

        Raise ValueError for a wrong shape or type, and for what the scorer refuses.
        """
        check_videos(videos, prompts)
        indices = self._indices(videos.shape[0], videos.shape[1], None)
        rows = torch.arange(videos.shape[0]).unsqueeze(1).expand_as(indices).flatten()
        columns = indices.flatten()
        parts = []
        for part in batches(len(rows), self.batch_size):
            row, column = rows[part], columns[part]
            images = videos[row, column]
            parts.append(self.scorer.score_images(images, [prompts[int(index)] for index in row]))
        scores = torch.cat(parts).view(indices.shape)
        return {self.dimensions[0]: self._reduce(scores, indices, videos.shape[1])}

    def score_pixels(
        self, videos: Tensor, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1.

        Return {dimension: float32 [B]} on the network's device, with gradients.

        ``generator`` (on the CPU) draws the frames of reduce="segments", anew for each video; without it they are the
        middle ones, as in ``score``. Raise ValueError as ``score`` does, and for a scorer without gradients.
        """
        differentiable = getattr(self.scorer, "score_image_pixels", None)
        if differentiable is None:
            raise ValueError(
                f"{type(self.scorer).__name__} passes no gradients to pixels; use score, or another reward"
            )
        check_video_pixels(videos, prompts)
        indices = self._indices(videos.shape[0], videos.shape[1], generator)
        rows = torch.arange(videos.shape[0]).unsqueeze(1).expand_as(indices)
        images = videos[rows.to(videos.device), indices.to(videos.device)].flatten(0, 1)
        texts = [prompts[int(row)] for row in rows.flatten()]
        parts = [differentiable(images[part], texts[part]) for part in batches(len(texts), self.batch_size)]
        scores = torch.cat(parts).view(indices.shape)
        return {self.dimensions[0]: self._reduce(scores, indices, videos.shape[1])}

    def _indices(self, count: int, num_frames: int, generator: torch.Generator | None) -> Tensor:
        """Return which frames of ``count`` videos are scored, int64 [count, f]."""
        if self.reduce == "segments":
            return torch.stack([segment_frames(num_frames, self.segments, generator) for _ in range(count)])
        return torch.tensor(spread_frames(num_frames, self.frames)).expand(count, -1)

    def _reduce(self, scores: Tensor, indices: Tensor, num_frames: int) -> Tensor:
        """Reduce the scores [B, f] of the frames ``indices`` [B, f] to [B]."""
        if self.reduce == "min":
            return scores.amin(1)
        if self.reduce == "segments":
            decay = 4 / (num_frames // self.segments) if self.decay is None else self.decay
            scores = scores * segment_weights(indices, num_frames, decay).to(scores.device)
        return scores.mean(1)


def _check(kind: str, inputs: Videos, ndim: int, channels: int, layout: str, prompts: Sequence[str]) -> None:
    if inputs.ndim != ndim or inputs.shape[channels] != 3 or 0 in inputs.shape:
        raise ValueError(
            f"{kind}s have shape {tuple(inputs.shape)}, expected {layout} without an empty side; "
            f"{kind}s of different sizes go in separate calls"
        )
    if len(prompts) != inputs.shape[0]:
        raise ValueError(f"{len(prompts)} prompts for {inputs.shape[0]} {kind}s; give one for each")


def _check_bytes(kind: str, inputs: Videos) -> None:
    if inputs.dtype != torch.uint8:
        raise ValueError(f"{kind}s are {inputs.dtype}, expected torch.uint8 levels 0..255")


def _check_floats(kind: str, inputs: Tensor) -> None:
    if not inputs.is_floating_point():
        raise ValueError(f"{kind}s are {inputs.dtype}, expected floats in 0..1")


def check_videos(videos: Videos, prompts: Sequence[str]) -> None:
    """Raise ValueError unless ``videos`` are uint8 [B, F, H, W, 3] with B prompts."""
    _check_bytes("video", videos)
    _check("video", videos, 5, 4, "[B, F, H, W, 3]", prompts)


def check_moving(num_frames: int, reader: str) -> None:
    """Raise ValueError for videos of a single frame; ``reader`` is the model that judges them."""
    if num_frames < 2:
        raise ValueError(
            f"videos have {num_frames} frame, expected at least 2: {reader} judges motion too, which a picture "
            "does not have"
        )


def check_enough_frames(num_frames: int, count: int, reader: str) -> None:
    """ValueError for fewer frames than the ``count`` that ``reader`` takes: repeating some would show a standstill."""
    if num_frames < count:
        raise ValueError(
            f"videos have {counted_frames(num_frames)}, but {reader} reads {count}; give it at least {count}"
        )


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless ``images`` are uint8 [B, H, W, 3] with B prompts."""
    _check_bytes("image", images)
    _check("image", images, 4, 3, "[B, H, W, 3]", prompts)


def check_video_pixels(videos: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless ``videos`` are floats [B, F, 3, H, W] with B prompts."""
    _check_floats("video", videos)
    _check("video", videos, 5, 2, "[B, F, 3, H, W]", prompts)


def check_image_pixels(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless ``images`` are floats [B, 3, H, W] with B prompts."""
    _check_floats("image", images)
    _check("image", images, 4, 1, "[B, 3, H, W]", prompts)


def check_prompts(prompts: Sequence[str], reader: str) -> None:
    """Raise ValueError for a prompt without text; ``reader`` is the model that reads them."""
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {row} is {prompt!r}, expected text: {reader} judges by it")


def check_prompt(prompt: str, tokens: Sequence[str], reader: str) -> None:
    """Raise what ``check_prompts`` and ``check_special_tokens`` raise of one prompt."""
    check_prompts([prompt], reader)
    check_special_tokens(prompt, tokens, reader)


def check_special_tokens(prompt: str, tokens: Sequence[str], reader: str) -> None:
    """Raise ValueError for a prompt with one of the special ``tokens`` in it; the tokenizer is that of ``reader``."""
    for token in tokens:
        if token in prompt:
            raise ValueError(
                f"prompt {prompt!r} contains {token!r}, which {reader}'s tokenizer reads as a special token; "
                "remove it from the prompt"
            )


def by_dimension(
    scores: Tensor, dimensions: Sequence[str], prompts: Sequence[str], name: str
) -> dict[str, Tensor]:
    """Return scores [B, D] of model ``name`` as {dimension: [B]}.

    Raise ValueError as ``check_finite`` does, naming the dimension.
    """
    columns = dict(zip(dimensions, scores.unbind(1), strict=True))
    for dimension, column in columns.items():
        check_finite(column.detach(), prompts, f"{name} ({dimension})")
    return columns


def check_finite(scores: Tensor, prompts: Sequence[str], name: str) -> None:
    """Raise ValueError naming the first of the scores [B] of model ``name`` that is not finite, and its prompt."""
    if bool(scores.isfinite().all()):
        return
    row = int((~scores.isfinite()).nonzero()[0, 0])
    raise ValueError(
        f"{name} gave {scores[row].item()} for input {row} ({prompts[row]!r}); its weights are damaged or "
        "overflow their type: load them anew, or with dtype=torch.bfloat16 or torch.float32"
    )
