"""Test which candidates become a pair, and its weight: against brute force, under permutations, at ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpo_engine.selection import Selected, gap_weights, select_pairs


def random_scores(seed: int, prompts: int = 50, candidates: int = 5, dimensions: int = 3) -> Tensor:
    """Parts [D, P, N] on a coarse grid, so that equal scores and ties occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (dimensions, prompts, candidates), generator=generator).float()


def by_brute_force(
    scores: list[float], parts: list[list[float]], min_gap: float
) -> tuple[int, int, float] | None:
    """The first ordered pair of the widest gap whose winner is no worse in any part; None where there is none."""
    best: tuple[int, int, float] | None = None
    for winner in range(len(scores)):
        for loser in range(len(scores)):
            no_worse = all(part[winner] >= part[loser] for part in parts)
            gap = scores[winner] - scores[loser]
            if winner != loser and no_worse and gap > min_gap and (best is None or gap > best[2]):
                best = winner, loser, gap
    return best


@pytest.mark.parametrize("min_gap", [0.0, 0.7])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_pareto_pairs_are_those_of_brute_force(dimensions: int, min_gap: float) -> None:
    parts = random_scores(dimensions, 200, dimensions=dimensions)
    scores = parts.mean(0)
    pairs = select_pairs(scores, min_gap, parts)
    kept = 0
    for prompt in range(200):
        expected = by_brute_force(scores[prompt].tolist(), parts[:, prompt].tolist(), min_gap)
        assert bool(pairs.tied[prompt]) == (expected is None)
        if expected is not None:
            assert float(pairs.gap[prompt]) == pytest.approx(expected[2], abs=1e-6)
            chosen = int(pairs.winner[prompt]), int(pairs.loser[prompt])
            assert all(part[chosen[0]] >= part[chosen[1]] for part in parts[:, prompt])
            kept += 1
    assert kept > 20
    assert kept < 200 or dimensions == 1


def test_pareto_takes_the_extremes_where_they_satisfy_it() -> None:
    parts = random_scores(1)
    scores = parts.mean(0)
    plain, pareto = select_pairs(scores), select_pairs(scores, 0.0, parts)
    prompts = torch.arange(len(scores))
    fine = (parts[:, prompts, plain.winner] >= parts[:, prompts, plain.loser]).all(0) & ~plain.tied
    assert fine.any()
    assert not fine.all()
    assert torch.equal(pareto.winner[fine], plain.winner[fine])
    assert torch.equal(pareto.loser[fine], plain.loser[fine])
    assert (pareto.gap <= plain.gap)[~pareto.tied].all()


def test_pareto_of_candidates_that_all_trade_off_is_a_tie() -> None:
    parts = torch.tensor([[[1.0, 2.0, 3.0]], [[30.0, 20.0, 10.0]]])
    assert select_pairs(parts.mean(0), 0.0, parts).tied.all()
    assert not select_pairs(parts.mean(0)).tied.any()


@pytest.mark.parametrize("rule", ["extremes", "pareto"])
def test_the_order_of_candidates_does_not_matter(rule: str) -> None:
    """The same candidates win and lose, with the same gaps, in whatever order they come."""
    generator = torch.Generator().manual_seed(3)
    parts = torch.rand(2, 40, 6, generator=generator)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(40)])
    moved = parts.gather(2, order.expand(2, -1, -1))

    def select(parts: Tensor) -> Selected:
        return select_pairs(parts.sum(0), 0.1, parts if rule == "pareto" else None)

    one, other = select(parts), select(moved)
    assert torch.equal(one.tied, other.tied)
    kept = ~one.tied
    assert kept.any()
    for name in ("winner", "loser"):
        back = order.gather(1, getattr(other, name)[:, None]).squeeze(1)
        assert torch.equal(getattr(one, name)[kept], back[kept])
    assert torch.equal(one.gap[kept], other.gap[kept])


def test_ties_are_exact() -> None:
    """A gap of min_gap is a tie, the next larger float is none."""
    above = float(torch.tensor(0.25).nextafter(torch.tensor(1.0)))
    scores = torch.tensor([[0.0, 0.25, 0.0], [0.0, above, 0.0], [1.0, 1.0, 1.0]])
    assert select_pairs(scores, 0.25).tied.tolist() == [True, False, True]
    assert select_pairs(scores).tied.tolist() == [False, False, True]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_weights_grow_with_the_gap_and_have_mean_one(power: float) -> None:
    """Over the kept pairs of all processes, here four, of which one has none."""
    generator = torch.Generator().manual_seed(0)
    gap, kept = torch.rand(64, generator=generator) + 1e-3, torch.rand(64, generator=generator) > 0.3
    kept[16:32] = False
    tied = ~kept
    powers = torch.where(kept, gap.double() ** power, 0.0)
    everywhere = torch.stack([powers.sum(), kept.sum()])
    parts = zip(gap.split(16), tied.split(16), strict=True)
    weights = torch.tensor(
        [
            weight
            for gaps, ties in parts
            for weight in gap_weights(gaps.tolist(), ties.tolist(), power, lambda sums: everywhere)
        ]
    )
    assert weights[~kept].tolist() == [0.0] * int((~kept).sum())
    assert float(weights[kept].double().mean()) == pytest.approx(1.0, abs=1e-6)
    expected = powers / powers[kept].mean()
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    assert weights.tolist() == gap_weights(gap.tolist(), tied.tolist(), power)
    if power:
        assert torch.equal(weights[kept].argsort(), gap[kept].argsort())


def test_a_step_of_ties_alone_weighs_nothing() -> None:
    assert gap_weights([0.0] * 3, [True] * 3, 1.0) == [0.0] * 3


def test_a_score_that_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match="reward of prompt 1, candidate 2 of this step is nan"):
        select_pairs(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, torch.nan]]))
