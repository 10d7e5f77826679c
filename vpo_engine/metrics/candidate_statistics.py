"""Statistics of a step's candidates that the watch reads: how they look and move, and how much the prompt decides.

They are made of what a step has at hand anyway. Letters: B videos, F frames, P prompts, N candidates of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.appearance import STATISTICS
from vpo_engine.protocols import Reward
from vpo_engine.rewards.builtin import motion, small_luminance
from vpo_engine.rewards.combine import MOTION
from vpo_engine.rewards.frames import spread_frames
from vpo_engine.values import Choice

WATCHED = (*STATISTICS, "motion")
"""What is measured of every candidate's video."""
_FRAMES, _STEPS = 4, 2
"""Frames of a video whose look is measured, and steps from a frame to the next whose motion is."""
_AT_ONCE = 2**20
"""About how many pixels are measured at a time."""
_POOLED = 2
"""Latents are averaged to so many places along each of time, height and width before prompts are compared."""


class WatchedReward:
    """A reward that also measures the videos it scores; ``take`` returns what it has measured."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.dimensions = reward, tuple(reward.dimensions)
        self._seen: list[tuple[Tensor, Sequence[str]]] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the reward's scores."""
        scores = self.reward.score(videos, prompts)
        self._seen.append((video_statistics(videos), prompts))
        return scores

    def take(self, processes: Processes) -> dict[str, float]:
        """Return ``Moments`` of all videos that all processes have scored since the last call; {} without any."""
        seen, self._seen = self._seen, []
        values = torch.cat([torch.zeros(0, len(WATCHED)), *(each.cpu() for each, _ in seen)])
        texts = [text for _, prompts in seen for text in prompts]
        return moments(WATCHED, values, texts, processes, replicated=False)


def video_statistics(videos: Tensor) -> Tensor:
    """Measure uint8 videos [B, F, H, W, 3], H and W at least 3; return float32 [B, len(WATCHED)] on their device.

    The look is measured in levels 0..255 as ``appearance`` does, of four frames. The motion is that of
    ``rewards.guards.motion``, per cent of the shorter side, at two places of the video; 0 for a single frame.
    """
    count = videos.shape[1]
    frames = videos[:, spread_frames(count, _FRAMES)]
    size = max(1, _AT_ONCE // frames[0, 0, ..., 0].numel())
    looks = torch.cat([_looks(part) for part in frames.flatten(0, 1).split(size)])
    looks = looks.unflatten(0, frames.shape[:2]).mean(1)
    starts = spread_frames(count - 1, _STEPS)
    if not starts:
        return torch.cat([looks, looks.new_zeros(len(videos), 1)], dim=1)
    steps = torch.stack([videos[:, starts], videos[:, [start + 1 for start in starts]]], dim=2).flatten(0, 1)
    luma = torch.cat(
        [small_luminance(part.movedim(-1, 2).float() / 255) for part in steps.split(max(1, size // 2))]
    )
    moved = 100 * motion(luma) / min(luma.shape[3:])
    return torch.cat([looks, moved.unflatten(0, (len(videos), -1)).mean(1, keepdim=True)], dim=1)


def _looks(frames: Tensor) -> Tensor:
    """Measure brightness, contrast, saturation and sharpness of frames, uint8 [n, H, W, 3]; return float32 [n, 4]."""
    pixels = frames.float()
    luma = pixels @ torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    laplacian = 4 * luma[:, 1:-1, 1:-1] - around
    saturation = (pixels.amax(3) - pixels.amin(3)).mean((1, 2))
    return torch.stack(
        (luma.mean((1, 2)), luma.std((1, 2), correction=0), saturation, laplacian.abs().mean((1, 2))), dim=1
    )


def candidate_statistics(choices: Sequence[Choice], processes: Processes) -> dict[str, float]:
    """Return what the scores and latents of the candidates of all processes say: ``moments`` of the scores, and

    watch/prompt_share: the share of the variance of the candidates' latents, each averaged to a few places, that lies
    between prompts and not between the candidates of one prompt (the intraclass correlation): 0 if the prompt decides
    nothing, 1 if it decides everything. It is absent where there are too few prompts or the candidates are all alike.
    """
    names = [name for name in choices[0].candidates[0].scores if name != MOTION]
    rows = [[one.scores[name] for name in names] for choice in choices for one in choice.candidates]
    texts = [choice.prompt.text for choice in choices for _ in choice.candidates]
    labels = [f"reward/{name}" for name in names]
    found = moments(labels, torch.tensor(rows), texts, processes, replicated=True)
    for label in labels:
        del found[f"watch/{label}"]  # the mean is logged already
    counts, centres = _prompt_sums(choices)
    # All members of a team have the same candidates.
    summed = processes.sum(torch.cat([counts, centres]).to(processes.device)).cpu() / processes.team_size
    return found | _prompt_share(summed[: len(counts)].tolist(), float(summed[len(counts) :].square().sum()))


def _prompt_sums(choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """Return five sums over prompts of n candidates with pooled latents x, and the sum of all x; float64.

    The sums are those of 1, n, n squared, n times the square of the mean of x, and the squares of x less that mean.
    Prompts whose candidates have no latents any more, as those of stored pairs, do not count.
    """
    counts = torch.zeros(5, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for choice in choices:
        if not all(one.latents.numel() for one in choice.candidates):
            continue
        latents = torch.stack([one.latents for one in choice.candidates]).float()
        pooled = functional.adaptive_avg_pool3d(latents, _POOLED).flatten(1).double().cpu()
        count, mean = len(pooled), pooled.mean(0)
        counts += torch.tensor(
            [1, count, count**2, count * mean.square().sum(), (pooled - mean).square().sum()]
        )
        total = total + pooled.sum(0)
    return counts, total


def _prompt_share(counts: Sequence[float], square_of_total: float) -> dict[str, float]:
    """Return the intraclass correlation and its standard error, or {}.

    It comes from one-way analysis of variance with prompts of any number of candidates. The error is that of a single
    normal variable (R. A. Fisher; A. Donner, International Statistical Review 1986), an upper bound for several.
    """
    prompts, candidates, squares, between, within = counts
    if prompts < 2 or candidates <= prompts:
        return {}
    size = (candidates - squares / candidates) / (prompts - 1)
    mean_between = (between - square_of_total / candidates) / (prompts - 1)
    mean_within = within / (candidates - prompts)
    total = mean_between + (size - 1) * mean_within
    if total <= 0:
        return {}
    share = (mean_between - mean_within) / total
    error = (1 - share) * (1 + (size - 1) * share) * math.sqrt(2 / (size * (size - 1) * (prompts - 1)))
    return {"watch/prompt_share": share, "watch/se/prompt_share": abs(error)}


def moments(
    names: Sequence[str], values: Tensor, texts: Sequence[str], processes: Processes, *, replicated: bool
) -> dict[str, float]:
    """Return means, deviations and standard errors of values [n, len(names)] of videos of these n prompts.

    They are those of the values of all processes; {} if there are none. watch/<name>: the mean. watch/sd/<name>: the
    standard deviation. watch/se/<name>: the standard error of the mean; videos of one prompt resemble each other, so
    each prompt counts as one observation. replicated: whether all members of a team have the same values, and not each
    a part of them.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    exact = functional.pad(values.double(), (0, 1), value=1.0)
    by_prompt = exact.new_zeros(len(numbers), exact.shape[1])
    by_prompt.index_add_(0, torch.tensor([numbers[text] for text in texts], dtype=torch.int64), exact)
    crossed = by_prompt * by_prompt[:, -1:]
    sums = torch.stack([exact.sum(0), exact.square().sum(0), by_prompt.square().sum(0), crossed.sum(0)])
    # A prompt whose videos are spread over a team is seen in parts, whose squares are that much too small.
    spread = torch.tensor([1.0, 1.0, 1.0, 1.0] if replicated else [1.0, 1.0, *[processes.team_size] * 2])
    share = processes.team_size if replicated else 1
    sums = functional.pad(
        sums * spread.double()[:, None] / share, (0, 1), value=len(by_prompt) / processes.team_size
    )
    summed = processes.sum(sums.to(processes.device)).cpu()
    count, prompts = summed[0, -2:].tolist()
    if not count:
        return {}
    found: dict[str, float] = {}
    for column, name in enumerate(names):
        total, squares, of_prompts, weighted = summed[:, column].tolist()
        mean = total / count
        variance = max(squares / count - mean**2, 0.0)
        between = max(of_prompts - 2 * mean * weighted + mean**2 * float(summed[2, -2]), 0.0) / count**2
        error = (
            between * prompts / (prompts - 1) if prompts > 1 else variance
        )  # one prompt says little about others
        found |= {f"watch/{name}": mean, f"watch/sd/{name}": math.sqrt(variance)}
        found[f"watch/se/{name}"] = math.sqrt(error)
    return found
