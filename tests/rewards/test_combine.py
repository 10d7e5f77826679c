"""One number per video from a scorer's dimensions."""

import re

import pytest
import torch
from torch import Tensor

from vpo_engine.rewards.combine import combine


@pytest.fixture
def scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("visual_quality", "temporal_consistency", "dynamic_degree")
    return {name: torch.rand(2, 4, generator=generator) for name in names}


def test_one_dimension_is_that_dimension(scores: dict[str, Tensor]) -> None:
    assert torch.equal(combine(scores, ["temporal_consistency"]), scores["temporal_consistency"])
    assert torch.equal(combine(scores, "temporal_consistency"), scores["temporal_consistency"])


def test_several_are_averaged_plainly(scores: dict[str, Tensor]) -> None:
    expected = (scores["visual_quality"].double() + scores["dynamic_degree"].double()) / 2
    torch.testing.assert_close(
        combine(scores, ["visual_quality", "dynamic_degree"]).double(), expected, rtol=0, atol=1e-7
    )


def test_global_is_the_mean_of_all(scores: dict[str, Tensor]) -> None:
    expected = sum(value.double() for value in scores.values()) / 3
    torch.testing.assert_close(combine(scores, "global").double(), expected, rtol=0, atol=1e-7)
    assert torch.equal(combine(scores, "global"), combine(scores, list(scores)))
    assert torch.equal(combine(scores, "global"), combine(scores, ("global",)))


def test_average_is_taken_in_float32() -> None:
    scores = {
        "a": torch.tensor([2.0], dtype=torch.bfloat16),
        "b": torch.tensor([2.015625], dtype=torch.bfloat16),
    }
    assert combine(scores, "global").tolist() == [2.0078125]


def test_keeps_shape_and_leaves_scores_alone(scores: dict[str, Tensor]) -> None:
    before = {name: value.clone() for name, value in scores.items()}
    combined = combine(scores, ["visual_quality"])
    combined.add_(1)
    assert combined.shape == (2, 4)
    assert combined.dtype == torch.float32
    assert all(torch.equal(scores[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        (
            ["visual_quality", "beauty"],
            "unknown reward dimension 'beauty'; this scorer has visual_quality, temporal_consistency, "
            'dynamic_degree; "global" alone stands for all',
        ),
        ("beauty", "unknown reward dimension 'beauty'"),
        (["global", "visual_quality"], "unknown reward dimension 'global'"),
        ([], "no reward dimension selected; name some of visual_quality"),
        (["visual_quality", "visual_quality"], "name one twice"),
    ],
)
def test_refuses(scores: dict[str, Tensor], dimensions: list[str] | str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        combine(scores, dimensions)
