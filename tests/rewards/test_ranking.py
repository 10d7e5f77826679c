"""MRR and recall@k against worked examples, by definition, and their intervals."""

import json
import re
from pathlib import Path

import pytest
import torch

from vpo_engine.metrics.ranking import Ranking, Ties, chance, rank_preferences, ranks

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "rewards" / "ranking" / "golden.json").read_text())
SCORES, PREFERRED = GOLDEN["scores"], GOLDEN["preferred_index"]


def random_scores(prompts: int, candidates: int = 8, seed: int = 0) -> list[list[float]]:
    return torch.randn(prompts, candidates, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("ties", ["mean", "optimistic", "pessimistic"])
def test_worked_example(ties: Ties) -> None:
    expected = GOLDEN["results"][ties]
    assert ranks(SCORES, PREFERRED, ties).tolist() == expected["ranks"]
    ranking = rank_preferences(SCORES, PREFERRED, ties=ties, recalls=(1, 2, 4, 8))
    assert ranking.prompts == 12
    for name, estimate in ranking.measures.items():
        assert estimate.value == pytest.approx(expected[name], abs=1e-12)


def test_ties_are_fair_by_default() -> None:
    """A scorer that says the same of everything is in the middle, neither first nor last."""
    assert ranks([[0.5] * 8], [3]).tolist() == [4.5]


def test_chance() -> None:
    assert chance([8, 8, 8]) == pytest.approx(GOLDEN["chance_8"])
    assert chance([2, 4], (3,)) == pytest.approx({"mrr": (0.75 + 25 / 48) / 2, "recall@3": (1 + 0.75) / 2})


def test_random_scores_are_at_chance() -> None:
    ranking = rank_preferences(random_scores(4000), [0] * 4000, resamples=200)
    for name, expected in ranking.chance.items():
        assert ranking.measures[name].value == pytest.approx(expected, abs=0.025)  # three standard errors


def test_perfect_and_worst() -> None:
    rows = [sorted(row) for row in random_scores(20)]
    best, worst = rank_preferences(rows, [7] * 20), rank_preferences(rows, [0] * 20)
    assert {(e.low, e.value, e.high) for e in best.measures.values()} == {(1.0, 1.0, 1.0)}
    assert worst.measures["mrr"].value == pytest.approx(1 / 8)
    assert worst.measures["recall@4"].value == 0


def test_prompts_of_different_sizes() -> None:
    assert ranks([[1.0, 2.0], [3.0, 1.0, 2.0, 4.0]], [0, 2]).tolist() == [2, 3]


class TestIntervals:
    def test_same_arguments_same_intervals(self) -> None:
        assert rank_preferences(SCORES, PREFERRED) == rank_preferences(SCORES, PREFERRED)
        other = rank_preferences(SCORES, PREFERRED, seed=1)
        assert other.measures["mrr"] != rank_preferences(SCORES, PREFERRED).measures["mrr"]

    def test_as_wide_as_the_normal_approximation(self) -> None:
        scores = random_scores(400)
        reciprocal = 1 / ranks(scores, [0] * 400)
        half = 1.96 * reciprocal.std().item() / 20
        mrr = rank_preferences(scores, [0] * 400).measures["mrr"]
        assert mrr.low == pytest.approx(mrr.value - half, abs=0.15 * half)
        assert mrr.high == pytest.approx(mrr.value + half, abs=0.15 * half)

    def test_more_confidence_is_wider(self) -> None:
        def width(ranking: Ranking) -> float:
            mrr = ranking.measures["mrr"]
            assert mrr.low is not None
            assert mrr.high is not None
            return mrr.high - mrr.low

        narrow, wide = (rank_preferences(SCORES, PREFERRED, confidence=share) for share in (0.5, 0.99))
        assert width(narrow) < width(wide)

    def test_one_prompt_has_none(self) -> None:
        mrr = rank_preferences([[1.0, 0.0]], [1]).measures["mrr"]
        assert (mrr.value, mrr.low, mrr.high) == (0.5, None, None)


@pytest.mark.parametrize(
    ("scores", "preferred", "message"),
    [
        ([], [], "0 prompts have scores and 0 a preference"),
        ([[1.0, 2.0]], [0, 1], "1 prompts have scores and 2 a preference"),
        ([[1.0, 2.0], [1.0]], [0, 0], "prompt 1 has 1 candidates, expected at least 2"),
        ([[1.0, 2.0]], [2], "prompt 0 prefers candidate 2, but has candidates 0 to 1"),
        ([[1.0, 2.0]], [-1], "prompt 0 prefers candidate -1"),
        ([[1.0, float("nan")]], [0], "prompt 0, candidate 1 has score nan, expected a finite number"),
    ],
)
def test_ranking_refusals(scores: list[list[float]], preferred: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rank_preferences(scores, preferred)


def test_ranking_refuses_settings() -> None:
    with pytest.raises(ValueError, match="ties is 'fair', expected one of mean, optimistic, pessimistic"):
        ranks([[1.0, 2.0]], [0], "fair")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"recalls are \[0\]"):
        rank_preferences(SCORES, PREFERRED, recalls=(0,))
    with pytest.raises(ValueError, match="confidence 1 must lie between 0 and 1"):
        rank_preferences(SCORES, PREFERRED, confidence=1)
