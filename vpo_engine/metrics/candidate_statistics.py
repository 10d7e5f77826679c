"""Statistics of a step's candidates that the watch reads: how they look and move, and how much the prompt decides.

They are made of what a step has at hand anyway. Letters: B videos, F frames, P prompts, N candidates of each.
"""

from __future__ import annotations

import hashlib
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

    def forget(self) -> None:
        """Forget what was measured of videos that no step is made of."""
        self._seen = []

    def take(self, prompts: Sequence[str], processes: Processes) -> dict[str, float]:
        """Return ``moments`` of all videos that all processes have scored since the last call; {} without any.

        prompts: the texts of this team's prompts.
        """
        seen, self._seen = self._seen, []
        values = torch.cat([torch.zeros(0, len(WATCHED)), *(each.cpu() for each, _ in seen)])
        texts = [text for _, prompts in seen for text in prompts]
        return moments(WATCHED, values, texts, prompts, processes)


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
    nothing, 1 if it decides everything. It is absent where there are fewer than three prompts or candidates are alike.
    """
    names = [name for name in choices[0].candidates[0].scores if name != MOTION]
    rows = [[one.scores[name] for name in names] for choice in choices for one in choice.candidates]
    texts = [choice.prompt.text for choice in choices for _ in choice.candidates]
    labels = [f"reward/{name}" for name in names]
    prompts = [choice.prompt.text for choice in choices]
    found = moments(labels, torch.tensor(rows), texts, prompts, processes)
    for label in labels:
        del found[f"watch/{label}"]  # the mean is logged already
    totals, of_prompts = _prompt_sums(choices)
    team, teams = processes.rank // processes.team_size, processes.count // processes.team_size
    table = of_prompts.new_zeros(teams, *of_prompts.shape)
    table[team] = of_prompts
    # All members of a team have the same candidates.
    share = 1 / processes.team_size
    summed = processes.sum(share * torch.cat([totals, table.flatten()]).to(processes.device)).cpu()
    return found | _prompt_share(summed[: len(totals)], summed[len(totals) :].view(-1, len(totals)))


def _prompt_sums(choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """Return sums over this team's prompts, and what each prompt adds to them, [P, sums]; float64.

    Of a prompt with n candidates and pooled latents x they are 1, n, n squared, n times the square of the mean of x,
    the squares of x less that mean, and the sum of x, as many numbers as x has.
    """
    sizes = [len(choice.candidates) for choice in choices]
    pooled = [
        functional.adaptive_avg_pool3d(
            torch.stack([one.latents for one in choice.candidates]).float(), _POOLED
        ).flatten(1)
        for choice in choices
    ]
    exact = torch.cat(pooled).cpu().double()
    candidates = torch.tensor(sizes)
    numbers = torch.arange(len(sizes)).repeat_interleave(candidates)
    of_prompts = torch.zeros(len(sizes), exact.shape[1], dtype=torch.float64)
    of_prompts.index_add_(0, numbers, exact)
    squares = of_prompts.square().sum(1).tolist()
    between = math.fsum(square / size for square, size in zip(squares, sizes, strict=True))
    within = max(float(exact.square().sum()) - between, 0.0)
    counts = [len(sizes), sum(sizes), sum(size**2 for size in sizes), between, within]
    totals = torch.cat([torch.tensor(counts, dtype=torch.float64), of_prompts.sum(0)])
    own = (exact - (of_prompts / candidates[:, None])[numbers]).square().sum(1)
    columns = (
        torch.ones(len(sizes)),
        candidates,
        candidates**2,
        of_prompts.square().sum(1) / candidates,
        own.new_zeros(len(sizes)).index_add_(0, numbers, own),
    )
    return totals, torch.cat([torch.stack([each.double() for each in columns], dim=1), of_prompts], dim=1)


def _prompt_share(totals: Tensor, rows: Tensor) -> dict[str, float]:
    """Return the intraclass correlation and its standard error, or {}.

    It comes from one-way analysis of variance with prompts of any number of candidates. The error is the jackknife's:
    it follows from how the correlation changes when one prompt is left out, whatever the distribution of latents and
    however many numbers they have, and is too large rather than too small on the average (B. Efron and C. Stein, The
    jackknife estimate of variance, Annals of Statistics 1981).
    """
    share = _intraclass_correlation(totals)
    left_out = [_intraclass_correlation(totals - row) for row in rows]
    known = [value for value in left_out if value is not None]
    if share is None or len(known) < len(rows):
        return {}
    mean = math.fsum(known) / len(known)
    squares = math.fsum((value - mean) ** 2 for value in known)
    return {
        "watch/prompt_share": share,
        "watch/se/prompt_share": math.sqrt((len(known) - 1) / len(known) * squares),
    }


def _intraclass_correlation(sums: Tensor) -> float | None:
    """Return the share of the variance that lies between prompts; None where sums of too few say nothing."""
    prompts, candidates, squares, between, within = sums[:5].tolist()
    if prompts < 2 or candidates <= prompts:
        return None
    size = (candidates - squares / candidates) / (prompts - 1)
    square_of_total = math.fsum(value**2 for value in sums[5:].tolist())
    mean_between = (between - square_of_total / candidates) / (prompts - 1)
    mean_within = within / (candidates - prompts)
    total = mean_between + (size - 1) * mean_within
    return (mean_between - mean_within) / total if total > 0 else None


def moments(
    names: Sequence[str],
    values: Tensor,
    texts: Sequence[str],
    prompts: Sequence[str],
    processes: Processes,
) -> dict[str, float]:
    """Return means, deviations and standard errors of values [n, len(names)] of videos of the prompts ``texts``.

    They are those of the values of all processes; {} if there are none. watch/<name>: the mean. watch/sd/<name>: the
    standard deviation. watch/se/<name>: the standard error of the mean; videos of one prompt resemble each other, so
    each prompt counts as one observation. prompts: those of this process's team, as many as every other team has.
    Each member of a team gives a part of the team's values, or all members give all of them.
    """
    by_prompt = _by_prompt(values, texts, prompts, processes)
    products = by_prompt.T @ by_prompt
    totals, squares, weighted = (
        part.tolist() for part in (by_prompt.sum(0), products.diagonal(), products[-1])
    )
    count, seen = totals[-1], len(by_prompt)
    if not count:
        return {}
    found: dict[str, float] = {}
    for column, name in enumerate(names):
        mean = totals[column] / count
        variance = max(totals[len(names) + column] / count - mean**2, 0.0)
        between = max(squares[column] - 2 * mean * weighted[column] + mean**2 * squares[-1], 0.0) / count**2
        # One prompt says little about others.
        error = between * seen / (seen - 1) if seen > 1 else variance
        found |= {f"watch/{name}": mean, f"watch/sd/{name}": math.sqrt(variance)}
        found[f"watch/se/{name}"] = math.sqrt(error)
    return found


def _by_prompt(values: Tensor, texts: Sequence[str], prompts: Sequence[str], processes: Processes) -> Tensor:
    """Return sums over the videos of each distinct prompt that any process has seen, [prompts, 2 m + 1] in float64.

    They are sums of values [n, m], of their squares, and of 1. Each process adds its part to the row of a prompt, so
    that it does not matter how a prompt's videos are spread. The arguments are those of ``moments``.
    """
    exact = values.double()
    rows = torch.cat([exact, exact.square(), exact.new_ones(len(exact), 1)], dim=1)
    team, size = processes.rank // processes.team_size, len(prompts)
    mine = slice(team * size, (team + 1) * size)
    table = rows.new_zeros(processes.count // processes.team_size * size, 1 + rows.shape[1])
    if processes.first_of_team:
        table[mine, 0] = torch.tensor([_key(text) for text in prompts], dtype=table.dtype)
    places = {text: number for number, text in enumerate(prompts)}
    table[mine, 1:].index_add_(0, torch.tensor([places[text] for text in texts], dtype=torch.int64), rows)
    table = processes.sum(table.to(processes.device)).cpu()
    keys = table[:, 0].tolist()
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    merged = rows.new_zeros(len(numbers), rows.shape[1])
    merged.index_add_(0, torch.tensor([numbers[key] for key in keys], dtype=torch.int64), table[:, 1:])
    return merged[merged[:, -1] > 0]


def _key(text: str) -> int:
    """Return a number that float64 holds exactly and that no other prompt of a step has: 48 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
