"""Test the statistics of candidates: what they measure, their errors, and that processes agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vpo_engine.metrics.appearance import STATISTICS, appearance
from vpo_engine.metrics.candidate_statistics import (
    WATCHED,
    WatchedReward,
    candidate_statistics,
    moments,
    video_statistics,
)
from vpo_engine.protocols import TextEmbedding
from vpo_engine.rewards.guards import motion
from vpo_engine.values import Candidate, Choice, Prompt

PROMPTS, EACH = 12, 4


class Group:
    """A process of several. ``others``: what the others add to each sum, in order."""

    device = torch.device("cpu")

    def __init__(
        self, rank: int = 0, count: int = 1, team_size: int = 1, others: Sequence[Tensor] = ()
    ) -> None:
        self.rank, self.count, self.team_size = rank, count, team_size
        self.given: list[Tensor] = []
        self.first_of_team = rank % team_size == 0
        self._others = iter(others)

    def sum(self, values: Tensor) -> Tensor:
        self.given.append(values.clone())
        return values + next(self._others, 0.0)


def values(seed: int = 0) -> tuple[Tensor, list[str]]:
    """Return two statistics of the candidates, whose prompts differ more than the candidates of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    of_prompts = 2 * torch.randn(PROMPTS, 1, 2, generator=generator)
    made = 60 + of_prompts + torch.randn(PROMPTS, EACH, 2, generator=generator)
    return made.flatten(0, 1), [f"prompt {number}" for number in range(PROMPTS) for _ in range(EACH)]


def moments_of(made: Tensor, texts: Sequence[str], prompts: Sequence[str], group: Any) -> Any:
    return moments(["a", "b"], made, texts, prompts, group)


def test_the_standard_error_takes_each_prompt_as_one_observation() -> None:
    made, texts = values()
    found = moments_of(made, texts, texts[::EACH], Group())
    of_prompts = made.double().unflatten(0, (PROMPTS, EACH)).mean(1)
    for column, name in enumerate("ab"):
        assert found[f"watch/{name}"] == pytest.approx(float(made[:, column].double().mean()), rel=1e-12)
        deviation = float(made[:, column].double().std(correction=0))
        assert found[f"watch/sd/{name}"] == pytest.approx(deviation, rel=1e-9)
        assert found[f"watch/se/{name}"] == pytest.approx(
            float(of_prompts[:, column].std()) / PROMPTS**0.5, rel=1e-9
        )


ALL = list(range(PROMPTS * EACH))
TEAMS = [[[0, 1, 4, 5, 6, 7, 8, 12], [2, 3, 9, 10, 11, 13, 14, 15]], [ALL[16:32], []], [ALL[32:40], ALL[40:]]]
"""The videos of each member of three teams: of a prompt's each member has all, some or none."""


@pytest.mark.parametrize("same_text", [False, True])
@pytest.mark.parametrize(
    "shares",
    [
        [[ALL[:24]], [ALL[24:]]],  # each process has prompts of its own
        [[ALL, ALL]],  # both have the same scores of the same candidates
        [[ALL[:16]] * 2, [ALL[16:32]] * 2, [ALL[32:]] * 2],
        TEAMS,
    ],
)
def test_processes_have_what_one_would_have(shares: Sequence[Sequence[list[int]]], same_text: bool) -> None:
    """However a prompt's videos are spread, also if one text stands in several teams."""
    made, texts = values()
    if same_text:
        texts[-EACH:] = texts[:EACH]
    alone = moments_of(made, texts, texts[::EACH], Group())
    size, count = len(shares[0]), sum(map(len, shares))
    each = PROMPTS // len(shares)

    def ask(rank: int, others: Sequence[Tensor] = ()) -> tuple[Group, Any]:
        team, own = rank // size, shares[rank // size][rank % size]
        group = Group(rank, count, size, others)
        prompts = texts[::EACH][team * each : (team + 1) * each]
        return group, moments_of(made[own], [texts[one] for one in own], prompts, group)

    given = [ask(rank)[0].given[0] for rank in range(count)]
    for rank in range(count):
        rest = torch.stack([sums for other, sums in enumerate(given) if other != rank]).sum(0)
        assert ask(rank, [rest])[1] == pytest.approx(alone, rel=1e-9)


def test_a_step_without_videos_has_no_statistics() -> None:
    reward: Any = SimpleNamespace(dimensions=("one",))
    assert WatchedReward(reward).take(["a"], Group()) == {}  # type: ignore[arg-type]


def test_videos_are_measured_as_evaluations_measure_them_and_only_once() -> None:
    generator = torch.Generator().manual_seed(1)
    videos = torch.randint(0, 256, (3, 4, 16, 20, 3), generator=generator, dtype=torch.uint8)
    found = video_statistics(videos)
    expected = appearance(videos)
    for place, name in enumerate(STATISTICS):
        torch.testing.assert_close(found[:, place], expected[name], rtol=1e-5, atol=0)
    steps = torch.stack([motion(videos[:, start : start + 2]) for start in (0, 2)]).mean(0)
    torch.testing.assert_close(found[:, WATCHED.index("motion")], steps, rtol=1e-5, atol=0)
    assert video_statistics(videos[:, :1])[:, WATCHED.index("motion")].tolist() == [0, 0, 0]

    reward: Any = SimpleNamespace(
        dimensions=("one",), score=lambda videos, prompts: {"one": torch.ones(len(videos))}
    )
    watched, alone = WatchedReward(reward), Group()
    assert watched.score(videos, ["a", "a", "b"])["one"].tolist() == [1, 1, 1]
    taken = watched.take(["a", "b"], alone)  # type: ignore[arg-type]
    assert taken["watch/brightness"] == pytest.approx(float(found[:, 0].double().mean()), rel=1e-9)
    assert watched.take(["a", "b"], Group()) == {}  # type: ignore[arg-type]


def choices_of(latents: Tensor) -> list[Choice]:
    """Return choices among candidates with these latents, [P, N, C, T, H, W], with their number as the score."""
    text = TextEmbedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    found = []
    for row, each in enumerate(latents):
        prompt = Prompt(f"prompt {row}", text, row)
        made = tuple(
            Candidate(prompt, number, each[number], {"one": float(number), "motion": 9.0})
            for number in range(len(each))
        )
        found.append(Choice(made, (0.0,) * len(made), made[0], made[1], 1.0, False))
    return found


def test_the_prompts_share_is_that_of_the_variance_between_prompts() -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (200, EACH, 2, 2, 2, 2)
    of_prompts = torch.randn(200, 1, 2, 2, 2, 2, generator=generator)
    own = torch.randn(shape, generator=generator)
    for weight, share in ((0.0, 0.0), (1.0, 0.5), (3.0, 0.9)):
        found = candidate_statistics(choices_of(weight * of_prompts + own), Group())  # type: ignore[arg-type]
        assert found["watch/prompt_share"] == pytest.approx(
            share, abs=0.04
        )  # 200 prompts and 16 numbers of each
        assert found["watch/sd/reward/one"] == pytest.approx(1.25**0.5)
        assert "watch/sd/reward/motion" not in found
        assert "watch/reward/one" not in found
    same = candidate_statistics(choices_of(torch.zeros(3, 2, 1, 2, 2, 2)), Group())  # type: ignore[arg-type]
    assert "watch/prompt_share" not in same
    single = candidate_statistics(choices_of(own[:1]), Group())  # type: ignore[arg-type]
    assert "watch/prompt_share" not in single
    # One prompt says nothing about others: the error is at least the spread of its candidates.
    assert single["watch/se/reward/one"] == single["watch/sd/reward/one"]


def test_the_error_of_the_prompts_share_is_its_spread_over_steps() -> None:
    """As at 16 numbers of each of 8 prompts, where a bound for single numbers is more than twice as large."""
    generator = torch.Generator().manual_seed(3)
    shares, errors = [], []
    for _ in range(60):
        of_prompts = torch.randn(8, 1, 2, 2, 2, 2, generator=generator)
        own = torch.randn(8, EACH, 2, 2, 2, 2, generator=generator)
        found = candidate_statistics(choices_of(of_prompts + own), Group())  # type: ignore[arg-type]
        shares.append(found["watch/prompt_share"])
        errors.append(found["watch/se/prompt_share"])
    # The spread of 60 has an error of 9 %; a jackknife of 8 prompts is known to be some tenth too large.
    assert 0.7 < statistics.mean(errors) / statistics.stdev(shares) < 1.5


def test_teams_have_the_share_and_the_error_that_one_process_would_have() -> None:
    generator = torch.Generator().manual_seed(4)
    choices = choices_of(torch.randn(PROMPTS, EACH, 2, 2, 2, 2, generator=generator))
    alone = candidate_statistics(choices, Group())  # type: ignore[arg-type]
    parts = choices[: PROMPTS // 2], choices[PROMPTS // 2 :]
    members = [Group(rank, 4, 2) for rank in range(4)]  # of two teams of two
    for group in members:
        candidate_statistics(parts[group.rank // 2], group)  # type: ignore[arg-type]
    rest = [sum(given) for given in zip(*(group.given for group in members[1:]), strict=True)]
    together = candidate_statistics(parts[0], Group(0, 4, 2, rest))  # type: ignore[arg-type]
    assert together == pytest.approx(alone, rel=1e-9)
    assert {"watch/prompt_share", "watch/se/prompt_share"} < set(together)


def test_the_look_is_that_of_the_whole_video() -> None:
    """By its first frames a video that goes dark in its second half looks as ever."""
    video = torch.full((1, 16, 16, 16, 3), 100, dtype=torch.uint8)
    video[:, 8:] = 20
    assert appearance(video)["brightness"].tolist() == pytest.approx([60])
    assert video_statistics(video)[:, WATCHED.index("brightness")].tolist() == pytest.approx([60])


def test_prompts_with_more_candidates_weigh_as_the_analysis_of_variance_says() -> None:
    """By its definition; a prompt that was a tie has more candidates than others."""
    generator = torch.Generator().manual_seed(5)
    latents = [
        torch.randn(1, 2, 2, 2, 2, generator=generator) + torch.randn(size, 2, 2, 2, 2, generator=generator)
        for size in (2, 4, 2, 6)
    ]

    def share(given: Sequence[Tensor]) -> float:
        groups = [each.flatten(1).double() for each in given]
        whole, prompts = torch.cat(groups), len(groups)
        middle, total = whole.mean(0), len(whole)
        between = sum(len(each) * float((each.mean(0) - middle).square().sum()) for each in groups)
        within = sum(float((each - each.mean(0)).square().sum()) for each in groups) / (total - prompts)
        size = (total - sum(len(each) ** 2 for each in groups) / total) / (prompts - 1)
        between /= prompts - 1
        return (between - within) / (between + (size - 1) * within)

    found = candidate_statistics(choices_of(latents), Group())  # type: ignore[arg-type]
    assert found["watch/prompt_share"] == pytest.approx(share(latents), rel=1e-6)
    without = [share(latents[:number] + latents[number + 1 :]) for number in range(4)]
    error = math.sqrt(3 / 4 * sum((one - statistics.mean(without)) ** 2 for one in without))
    assert found["watch/se/prompt_share"] == pytest.approx(error, rel=1e-6)
