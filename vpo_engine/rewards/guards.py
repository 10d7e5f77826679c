"""What goes wrong with rewards in online training, noticed: noise, prompts unread, stillness that wins, overfitting.

A policy finds whatever its reward pays for. A still clip is often the sharpest and most consistent one; a score that
does not read the prompt pays for forgetting it. Letters: B videos, N candidates, F frames.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpo_engine.protocols import Reward

CLEAR = 2.0
"""Standard errors by which a trend has to differ from none."""


def check_deterministic(reward: Reward, video: Tensor, prompt: str) -> None:
    """Score one clip twice, uint8 [F, H, W, 3], and compare the scores bit by bit.

    ValueError naming the first dimension that differs, and its two values.
    """
    first, second = (reward.score(video.unsqueeze(0), [prompt]) for _ in range(2))
    for name, once in first.items():
        again = second[name]
        if not torch.equal(once.view(torch.int32), again.view(torch.int32)):
            raise ValueError(
                f"{name} of one clip ({prompt!r}) is {once.item()!r}, and {again.item()!r} when scored again; rewards "
                "have to be deterministic: put the scorer in evaluation mode, seed or remove what it draws"
            )


def prompt_shuffle(reward: Reward, videos: Tensor, prompts: Sequence[str], seed: int = 0) -> dict[str, float]:
    """How often a clip's own prompt scores higher than another clip's, by dimension.

    videos: uint8 [B, F, H, W, 3] with B prompts. The other prompt is drawn by ``seed`` from those with another text.
    Of each dimension the share of clips, 0..1, that score higher with their own, where a tie is not higher: near 1 if
    it reads the prompt, near 0.5 if what it reads says nothing about the clip, 0 if it does not read it. ValueError
    for fewer than two different prompts.
    """
    if len(set(prompts)) < 2:
        raise ValueError(f"{len(set(prompts))} different prompts, expected at least 2 to exchange them")
    own, other = reward.score(videos, prompts), reward.score(videos, _others(prompts, seed))
    return {name: float((own[name] > other[name]).float().mean()) for name in own}


def _others(prompts: Sequence[str], seed: int) -> list[str]:
    """For each prompt one of another text, drawn from them all."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for prompt in prompts:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        drawn.append(next(prompts[index] for index in order if prompts[index] != prompt))
    return drawn


def motion(videos: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, in levels 0..255: uint8 [..., F, H, W, 3] to float32 [...].

    Flicker and noise count as motion, a moving camera too. ValueError for another type or fewer than two frames.
    """
    if videos.dtype != torch.uint8 or videos.ndim < 4 or videos.shape[-1] != 3 or videos.shape[-4] < 2:
        raise ValueError(
            f"videos are {videos.dtype} {tuple(videos.shape)}, expected torch.uint8 [..., F, H, W, 3] of at least two "
            "frames: one frame does not move"
        )
    frames = videos.unbind(-4)
    steps = zip(frames[1:], frames[:-1], strict=True)
    total = sum(
        ((after.short() - before).abs().float().mean(dim=(-3, -2, -1)) for after, before in steps),
        start=torch.zeros(videos.shape[:-4], device=videos.device),
    )
    return total / (len(frames) - 1)


@dataclass(frozen=True)
class MotionFloor:
    """Candidates that move less than ``floor`` levels a frame (see ``motion``) are not to win; they may lose."""

    floor: float

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 255:
            raise ValueError(f"floor is {self.floor}, expected levels from 0, which excludes nothing, to 255")

    def __call__(self, videos: Tensor) -> Tensor:
        """uint8 [..., F, H, W, 3], such as [P, N, F, H, W, 3], to bool [...], True for what must not win."""
        return motion(videos) < self.floor


class DivergenceAlarm:
    """Says once that the training reward rises while the held-out reward falls: the policy exploits its reward.

    Both trends are straight lines through the last ``window`` observations, clear of zero by ``CLEAR`` standard
    errors, so that noise alone rarely sets it off.
    """

    def __init__(self, window: int = 8) -> None:
        """``window``: observations, at least 4, as many as are seen before the first answer."""
        if window < 4:
            raise ValueError(f"window is {window}, expected at least 4: fewer observations show no trend")
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._raised = False

    def __call__(self, step: int, training: float, held_out: float) -> str | None:
        """Observe both rewards after a step; the message, once, or None. ValueError for a number that is not finite.

        held_out: of videos of prompts outside of the training, by a reward that is not trained against.
        """
        for name, value in (("training", training), ("held_out", held_out)):
            if not math.isfinite(value):
                raise ValueError(f"the {name} reward is {value} after step {step}, expected a finite number")
        self._seen.append((step, training, held_out))
        if self._raised or len(self._seen) < (self._seen.maxlen or 0):
            return None
        steps, rising, falling = zip(*self._seen, strict=True)
        if _trend(rising) < CLEAR or _trend(falling) > -CLEAR:
            return None
        self._raised = True
        return (
            f"from step {steps[0]} to {steps[-1]} the training reward rose from {rising[0]:.4g} to {rising[-1]:.4g} "
            f"while the held-out reward fell from {falling[0]:.4g} to {falling[-1]:.4g}: the policy exploits its "
            f"reward; look at its videos, and go back to the checkpoint of step {steps[0]} or before"
        )


def _trend(values: Sequence[float]) -> float:
    """Slope of the straight line through values at equal steps, in its standard errors; 0 if all are the same."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    error = ((y - slope * x).square().sum() / (len(y) - 2) / (x @ x)).sqrt()
    if slope.abs() <= torch.finfo(torch.float64).eps * max(map(abs, values)):
        return 0.0
    return float(slope / error)  # infinite for points on a line
