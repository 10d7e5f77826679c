"""Guards that notice what goes wrong with rewards: noise, unread prompts, still videos that win, overfitting.

A policy finds whatever its reward pays for. A still clip is often the sharpest and most consistent one; a score that
does not read the prompt pays for forgetting it. Letters: B videos, N candidates, F frames.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpo_engine.protocols import Reward
from vpo_engine.rewards.builtin import motion as mean_flow
from vpo_engine.rewards.builtin import small_luminance
from vpo_engine.rewards.combine import MOTION

CLEAR = 2.0
"""A trend counts if its slope differs from zero by this many standard errors."""


def check_deterministic(reward: Reward, video: Tensor, prompt: str) -> None:
    """Score one clip twice, uint8 [F, H, W, 3], and compare the scores bit by bit.

    Raise ValueError naming the first dimension that differs, and its two values.
    """
    first, second = (reward.score(video.unsqueeze(0), [prompt]) for _ in range(2))
    for name, once in first.items():
        again = second[name]
        if not torch.equal(once.view(torch.int32), again.view(torch.int32)):
            raise ValueError(
                f"{name} of one clip ({prompt!r}) is {once.item()!r}, and {again.item()!r} when scored again; rewards "
                "have to be deterministic: put the scorer in evaluation mode, seed or remove what it draws"
            )


@dataclass(frozen=True)
class Shuffled:
    """The numbers of ``clips`` that score higher, and lower, with their own prompt than with another clip's."""

    higher: int
    lower: int
    clips: int

    @property
    def share(self) -> float:
        """Return the share of clips that score higher with their own prompt.

        It is near 1 where the prompt is read, near 0.5 where what is read says nothing about the clip, and 0 where the
        prompt is not read.
        """
        return self.higher / self.clips

    def reads(self, level: float = 0.05) -> bool:
        """Return whether clips prefer their own prompts by more than chance, in a one-sided sign test without ties."""
        count = self.higher + self.lower
        return sum(math.comb(count, k) for k in range(self.higher, count + 1)) / 2**count < level


def prompt_shuffle(
    reward: Reward, videos: Tensor, prompts: Sequence[str], seed: int = 0
) -> dict[str, Shuffled]:
    """Count, for each dimension, the clips that score higher with their own prompt than with another clip's.

    videos: uint8 [B, F, H, W, 3] with B prompts. The other prompt is drawn by ``seed`` from those with another text.
    Raise ValueError for fewer than two different prompts.
    """
    if len(set(prompts)) < 2:
        raise ValueError(f"{len(set(prompts))} different prompts, expected at least 2 to exchange them")
    own, other = reward.score(videos, prompts), reward.score(videos, _others(prompts, seed))
    return {
        name: Shuffled(
            int((own[name] > other[name]).sum()), int((own[name] < other[name]).sum()), len(videos)
        )
        for name in own
    }


def _others(prompts: Sequence[str], seed: int) -> list[str]:
    """Draw, for each prompt, one with another text from them all."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for prompt in prompts:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        drawn.append(next(prompts[index] for index in order if prompts[index] != prompt))
    return drawn


def motion(videos: Tensor) -> Tensor:
    """Measure the mean length of the motion between neighbouring frames, in per cent of the shorter side.

    Takes uint8 [..., F, H, W, 3], returns float32 [...] on the CPU: the m of the builtin reward's dynamic_degree.

    Flicker counts for little and a moving camera in full; noise looks like motion. Raise ValueError for another
    type or fewer than two frames.
    """
    if videos.dtype != torch.uint8 or videos.ndim < 4 or videos.shape[-1] != 3 or videos.shape[-4] < 2:
        raise ValueError(
            f"videos are {videos.dtype} {tuple(videos.shape)}, expected torch.uint8 [..., F, H, W, 3] of at least two "
            "frames: one frame does not move"
        )
    found = []
    for video in videos.reshape(-1, *videos.shape[-4:]):
        luma = small_luminance(video.permute(0, 3, 1, 2).unsqueeze(0).float() / 255)
        found.append(100 * mean_flow(luma) / min(luma.shape[3:]))
    return torch.cat(found).cpu().view(videos.shape[:-4])


class WithMotion:
    """A reward whose scores have MOTION beside them, for a ``MotionFloor``."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.dimensions = (*reward.dimensions, MOTION)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the reward's scores, and ``motion`` beside them."""
        scores = self.reward.score(videos, prompts)
        return scores | {MOTION: motion(videos).to(next(iter(scores.values())).device)}


@dataclass(frozen=True)
class MotionFloor:
    """Candidates that move less than ``floor`` (see ``motion``) never win; they may lose."""

    floor: float

    def still(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return which candidates must not win, bool [P, N]; ``scores`` hold their MOTION."""
        return scores[MOTION] < self.floor

    def lower(self, selected: Tensor, scores: Mapping[str, Tensor]) -> Tensor:
        """Return ``selected`` [P, N] with the lowest value of the prompt for each still candidate."""
        return torch.where(self.still(scores), selected.amin(dim=1, keepdim=True), selected)


class DivergenceAlarm:
    """Says once that the training reward rises while the held-out reward falls: the policy exploits its reward.

    Both trends are straight lines through the last ``window`` observations, clear of zero by ``CLEAR`` standard
    errors, so that noise alone rarely sets it off. Once a run has reached all that its rewards can give, evaluations
    hardly differ, and a fall can be clear that nobody would notice; so a least fall can be asked for. Its state is what
    it has observed.
    """

    def __init__(self, window: int = 8) -> None:
        """``window``: how many observations are compared, at least 4; there is no alarm before there are as many."""
        if window < 4:
            raise ValueError(f"window is {window}, expected at least 4: fewer observations show no trend")
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._raised = False

    def __call__(self, step: int, training: float, held_out: float, least_fall: float = 0.0) -> str | None:
        """Observe both rewards after a step.

        Return the message, once, or None. Raise ValueError for a number that is not finite.

        held_out: of videos of prompts outside of the training, by a reward that is not trained against. least_fall: how
        far the held-out reward must have fallen, along its line.
        """
        for name, value in (("training", training), ("held_out", held_out)):
            if not math.isfinite(value):
                raise ValueError(f"the {name} reward is {value} after step {step}, expected a finite number")
        self._seen.append((step, training, held_out))
        if self._raised or len(self._seen) < (self._seen.maxlen or 0):
            return None
        steps, rising, falling = zip(*self._seen, strict=True)
        if _trend(rising)[1] < CLEAR:
            return None
        rise, clear = _trend(falling)
        if clear > -CLEAR or rise > -least_fall:
            return None
        self._raised = True
        return (
            f"from step {steps[0]} to {steps[-1]} the training reward rose from {rising[0]:.4g} to {rising[-1]:.4g} "
            f"while the held-out reward fell from {falling[0]:.4g} to {falling[-1]:.4g}: the policy exploits its "
            f"reward; look at its videos, and go back to the checkpoint of step {steps[0]} or before"
        )


def _trend(values: Sequence[float]) -> tuple[float, float]:
    """Return how far the straight line through values at equal steps rises, and the same in its standard errors.

    Both are 0 if all values are the same.
    """
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    error = ((y - slope * x).square().sum() / (len(y) - 2) / (x @ x)).sqrt()
    if slope.abs() <= torch.finfo(torch.float64).eps * max(map(abs, values)):
        return 0.0, 0.0
    return float(slope * (len(y) - 1)), float(slope / error)  # infinite for points on a line
