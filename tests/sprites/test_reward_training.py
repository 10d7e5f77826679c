"""Training of the sprites world's rewards: its measures, its data and its determinism."""

from __future__ import annotations

import math

import pytest
import torch

from tools.sprites import train_rewards
from tools.sprites.train_rewards import soften, spearman
from vpo_engine.data.sprites.damage import KINDS
from vpo_engine.data.sprites.measure import measure


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_spearman_by_hand():
    rising = torch.tensor([1.0, 2.0, 5.0, 9.0])
    assert spearman(rising, rising.exp()) == pytest.approx(1.0)
    assert spearman(rising, -rising) == pytest.approx(-1.0)
    assert spearman(rising, torch.ones(4)) == 0.0
    # ranks 0 1 2 3 against 0.5 0.5 2 3: covariance 4.5 over sqrt(5 * 4.5)
    assert spearman(rising, torch.tensor([1.0, 1.0, 2.0, 3.0])) == pytest.approx(4.5 / math.sqrt(22.5))


@pytest.mark.long
def test_training_is_a_function_of_the_seed_and_uses_the_round_trip(monkeypatch):
    monkeypatch.setattr(train_rewards, "POOL", 256)
    monkeypatch.setattr(train_rewards, "REWARD_STEPS", 3)
    trips = []

    def round_trip(videos):
        trips.append(len(videos))
        return soften(videos, seeded(13))

    seen = []
    networks = [
        train_rewards.train_reward(3, round_trip, lambda step, steps, loss: seen.append((step, steps, loss)))
        for _ in range(2)
    ]
    assert [step for step, steps, _ in seen] == [1, 2, 3, 1, 2, 3]
    assert seen[0] == seen[3]
    assert all(130 < count < 200 for count in trips)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_turned_clips_show_what_their_attributes_say():
    batch = train_rewards._draw_batch(256, seeded(17), None)
    turned = train_rewards._augmented(batch, seeded(18))
    assert torch.equal(turned.defects, batch.defects)
    moving = batch.attribute_weight[:, 2] > 0.9  # neither destroyed nor frozen
    assert (turned.attributes.direction != batch.attributes.direction)[moving].float().mean() > 0.4
    travelled = measure(turned.videos, turned.attributes.captions())["displacement"]
    assert (travelled[moving] > 4).all()
    left_out = (turned.attribute_weight != batch.attribute_weight).any(1)
    changing = batch.defects[:, KINDS.index("identity")] > 0
    assert left_out[changing].any()
    assert not left_out[~changing].any()


def test_only_destroyed_clips_are_turned_upside_down():
    batch = train_rewards._draw_batch(256, seeded(17), None)
    turned = train_rewards._augmented(batch, seeded(18)).videos
    upright = torch.zeros(256, dtype=torch.bool)
    for axes in ((), (1,), (3,), (1, 3)):
        upright |= (turned == batch.videos.flip(axes)).flatten(1).all(1)
    destroyed = batch.defects[:, -1] == 1
    assert upright[~destroyed].all()
    assert 0.3 < upright[destroyed].float().mean() < 0.8


@pytest.mark.long
def test_some_steps_of_training_learn(monkeypatch):
    """Small batches learn as much in 40 steps as those of the shipped weights in 60."""
    monkeypatch.setattr(train_rewards, "POOL", 256)
    monkeypatch.setattr(train_rewards, "BATCH", 16)
    monkeypatch.setattr(train_rewards, "JUDGE_STEPS", 40)
    losses = []
    train_rewards.train_judge(5, progress=lambda step, steps, loss: losses.append(loss))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
