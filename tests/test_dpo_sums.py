"""Test what the paired loss adds up over samples: losses by weight, saturation, and the error of a mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from step_case import pairs_of
from test_online_vpo import PROMPTS, make_algorithm, margin_away_from_the_reference

from vpo_engine.config import Config
from vpo_engine.objectives.dpo import DPO

Make = Callable[..., Config]


def test_each_pair_has_its_weight_also_where_that_of_another_is_one(small: Make) -> None:
    """Right after a refresh every loss is ln 2 times the weight of its pair."""
    algorithm = make_algorithm(small("objective.timesteps_per_pair=1"))
    latents = torch.randn(2, 2, *algorithm.model.latent_shape, generator=torch.Generator().manual_seed(1))
    pairs = pairs_of(latents[:, 0], latents[:, 1], algorithm.model.embed(PROMPTS), [0, 1])
    weighted = [replace(pair, weight=weight) for pair, weight in zip(pairs, (1.0, 0.25), strict=True)]
    assert algorithm.objective.backward(weighted, algorithm.reference)["loss"] == pytest.approx(
        1.25 * math.log(2), rel=1e-6
    )


def test_the_log_has_the_saturation_and_the_error_of_the_mean_of_single_samples(small: Make) -> None:
    """The saturation is |2 sigmoid(margin) - 1|; the error is that of the mean over pairs."""
    algorithm = make_algorithm(small("objective.timesteps_per_pair=4"))
    margin_away_from_the_reference(algorithm)
    latents = torch.randn(2, 2, *algorithm.model.latent_shape, generator=torch.Generator().manual_seed(4))
    pairs = pairs_of(latents[0], latents[1], algorithm.model.embed(PROMPTS), [3, 4])
    single = [
        algorithm.objective.backward(pairs, algorithm.reference, samples=range(number, number + 1))
        for number in range(8)
    ]
    for one in single:
        assert one["sigmoid_saturation"] == pytest.approx(abs(math.tanh(one["margin"] / 2)), rel=1e-5)
    assert any(one["sigmoid_saturation"] > 0.01 for one in single)
    changes = torch.tensor([one["winner_error_change"] for one in single], dtype=torch.float64)
    sums = [sum(one[name] for one in single) for name in DPO.METRICS]
    means = DPO.means(sums, 8, 2)
    assert means["winner_error_change"] == pytest.approx(float(changes.mean()), rel=1e-6)
    error = float(changes.std(correction=0)) / 2**0.5
    assert means["watch/se/winner_error_change"] == pytest.approx(error, rel=1e-3)
