"""One number per video from a scorer's dimensions."""

import re

import pytest
import torch
from torch import Tensor

from vpo_engine.rewards.combine import MOTION, chosen, combine, standard_scores


@pytest.fixture
def scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("visual_quality", "temporal_consistency", "dynamic_degree")
    return {name: torch.rand(2, 4, generator=generator) for name in names}


def test_one_dimension_is_that_dimension(scores: dict[str, Tensor]) -> None:
    assert torch.equal(combine(scores, ["temporal_consistency"]), scores["temporal_consistency"])
    assert torch.equal(combine(scores, "temporal_consistency"), scores["temporal_consistency"])


def test_the_motion_that_a_guard_measures_is_no_part_of_global(scores: dict[str, Tensor]) -> None:
    moving = {**scores, MOTION: torch.full((2, 4), 50.0)}
    assert torch.equal(combine(moving, "global"), combine(scores, "global"))
    assert torch.equal(chosen(moving, "global"), chosen(scores, "global"))


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


def test_weights_are_divided_by_their_sum(scores: dict[str, Tensor]) -> None:
    weights = {"temporal_consistency": 1.0, "visual_quality": 0.5}
    expected = (scores["temporal_consistency"].double() + 0.5 * scores["visual_quality"].double()) / 1.5
    torch.testing.assert_close(combine(scores, weights).double(), expected, rtol=0, atol=2e-7)
    alike = combine(scores, {"visual_quality": 3.0, "dynamic_degree": 3.0})
    torch.testing.assert_close(alike, combine(scores, ["visual_quality", "dynamic_degree"]))
    one = combine(scores, {"visual_quality": 0.3})
    torch.testing.assert_close(one, scores["visual_quality"])


def test_group_scores_are_standard_scores_of_each_prompt(scores: dict[str, Tensor]) -> None:
    def reference(values: Tensor) -> Tensor:
        exact = values.double()
        return (exact - exact.mean(1, keepdim=True)) / exact.std(1, correction=0, keepdim=True)

    expected = (reference(scores["visual_quality"]) + 3 * reference(scores["dynamic_degree"])) / 4
    found = combine(scores, {"visual_quality": 1.0, "dynamic_degree": 3.0}, "group")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_group_scores_do_not_depend_on_a_dimensions_scale(scores: dict[str, Tensor]) -> None:
    """So no dimension rules the sum by its range; without normalisation it does."""
    names = ["visual_quality", "dynamic_degree"]
    stretched = scores | {"dynamic_degree": 1000 * scores["dynamic_degree"] - 7}
    torch.testing.assert_close(
        combine(stretched, names, "group"), combine(scores, names, "group"), rtol=1e-4, atol=1e-4
    )
    ruled = combine(stretched, names).argmax(1)
    assert torch.equal(ruled, scores["dynamic_degree"].argmax(1))


def test_a_constant_dimension_says_nothing_in_its_group() -> None:
    """Also where the mean of equal numbers is not that number in floating point."""
    scores = {"flat": torch.full((2, 3), 0.1), "other": torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])}
    found = combine(scores, "global", "group")
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(found[0], torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5 / 2)
    assert torch.equal(standard_scores(torch.full((1, 7), 2.3)), torch.zeros(1, 7))
