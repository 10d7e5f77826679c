"""Test the sprites world's reward and judge: the protocol, and the accuracy of the shipped weights."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tools.sprites.train_rewards import HELD_OUT_SEED, rank_report, spearman
from vpo_engine.data.sprites.assets import load_vae, round_trip
from vpo_engine.data.sprites.damage import (
    DESTRUCTIONS,
    KINDS,
    Clips,
    damaged,
    mismatched_captions,
    sample_clean,
    sample_destroyed,
    sample_wrecks,
)
from vpo_engine.data.sprites.world import Attributes
from vpo_engine.protocols import Reward
from vpo_engine.rewards import sprites_networks
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesJudge, SpritesReward, dimensions_of
from vpo_engine.rewards.sprites_networks import JudgeNetwork, RewardNetwork, load_network, save_network

SCORERS = (SpritesReward, SpritesJudge)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request):
    return request.param()


@pytest.fixture(scope="module")
def report():
    return rank_report(load_network("reward"), load_network("judge"), count=256)


def test_both_are_rewards_with_videoscores_dimensions(scorer):
    reward: Reward = scorer
    assert reward.dimensions == DIMENSIONS
    assert DIMENSIONS == (
        "visual_quality",
        "temporal_consistency",
        "dynamic_degree",
        "text_alignment",
        "factual_consistency",
    )


def test_scores_are_float32_in_one_to_four_and_repeat_bit_for_bit(scorer):
    clips = sample_clean(70, seeded(1))  # more than one chunk
    before = clips.videos.clone()
    first, second = scorer.score(clips.videos, clips.captions), scorer.score(clips.videos, clips.captions)
    assert tuple(first) == DIMENSIONS
    for name, values in first.items():
        assert values.shape == (70,)
        assert values.dtype == torch.float32
        assert values.min() >= 1
        assert values.max() <= 4
        assert not values.requires_grad
        assert torch.equal(values, second[name])
    assert torch.equal(clips.videos, before)


def test_a_score_does_not_depend_on_the_other_clips_of_the_batch(scorer):
    clips = sample_clean(9, seeded(2))
    whole = scorer.score(clips.videos, clips.captions)
    for row in (0, 8):
        alone = scorer.score(clips.videos[row : row + 1], clips.captions[row : row + 1])
        for name in DIMENSIONS:
            torch.testing.assert_close(alone[name][0], whole[name][row], atol=1e-4, rtol=0)


def test_strided_views_score_as_their_copies(scorer):
    clips = sample_clean(8, seeded(3))
    view = clips.videos.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    for name, values in scorer.score(view, clips.captions).items():
        torch.testing.assert_close(
            values, scorer.score(clips.videos, clips.captions)[name], atol=1e-4, rtol=0
        )


CAPTION = "a red circle moving left"
CLIP = torch.zeros(1, 17, 32, 32, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        (CLIP.float(), [CAPTION], "torch.float32, expected torch.uint8"),
        (CLIP[0], [CAPTION], r"\(17, 32, 32, 3\), expected \[B, 17, 32, 32, 3\]"),
        (CLIP[:, :16], [CAPTION], r"\(1, 16, 32, 32, 3\)"),
        (CLIP.transpose(2, 4), [CAPTION], "expected"),
        (CLIP[:0], [], "B >= 1"),
        (CLIP, [CAPTION, CAPTION], "2 prompts for 1 videos"),
        (CLIP, [""], "caption ''"),
        (CLIP, ["a red dog moving left"], "'a red dog moving left' is not one of the sprites world"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(scorer, videos, prompts, message):
    with pytest.raises(ValueError, match=message):
        scorer.score(videos, prompts)


@pytest.mark.parametrize(("kind", "cls"), [("reward", RewardNetwork), ("judge", JudgeNetwork)])
def test_a_network_gone_bad_stops_the_run_instead_of_scoring(kind, cls):
    network = load_network(kind)
    assert isinstance(network, cls)
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    scorer = {"reward": SpritesReward, "judge": SpritesJudge}[kind](network)
    with pytest.raises(ValueError, match=rf"{kind} network gave visual_quality = nan for video 0 .*build"):
        scorer.score(CLIP, [CAPTION])


def test_networks_are_small_different_and_stateless():
    reward, judge = load_network("reward"), load_network("judge")
    assert sum(p.numel() for p in reward.parameters()) <= 350_000
    assert sum(p.numel() for p in judge.parameters()) <= 330_000
    assert set(reward.state_dict()) != set(judge.state_dict())
    stateful = (nn.modules.batchnorm._BatchNorm, nn.Dropout)
    for module in (*reward.modules(), *judge.modules()):
        assert not isinstance(module, stateful) or getattr(module, "p", None) == 0.0
    assert not any(p.requires_grad for p in (*reward.parameters(), *judge.parameters()))


def test_dimensions_of_known_severities():
    severities = torch.tensor([[0.0] * 5, [0.5, 0.5, 0.25, 0.75, 1.0], [0.0] * 5])
    scores = dimensions_of(severities, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 1 / 3, 1.0]))
    expected = {
        "visual_quality": [4, 3.25, 1],
        "temporal_consistency": [4, 1.75, 1],
        "dynamic_degree": [4, 1, 1],
        "text_alignment": [4, 2, 1],
        "factual_consistency": [4, 1.75, 1],
    }
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["reward", "judge"])
def test_saved_networks_load_and_the_wrong_kind_is_refused(kind, tmp_path):
    network = load_network(kind)
    path = tmp_path / "deep" / "network.safetensors"
    save_network(network, path)
    clips = sample_clean(4, seeded(4))
    loaded = load_network(kind, path)
    assert torch.equal(loaded(clips.videos).defects, network(clips.videos).defects)
    other = {"reward": "judge", "judge": "reward"}[kind]
    with pytest.raises(ValueError, match=f"holds network '{kind}', expected '{other}'"):
        load_network(other, path)


def test_missing_weights_name_the_build_command(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"python -m tools\.sprites build"):
        load_network("reward", tmp_path / "none.safetensors")
    monkeypatch.setattr(sprites_networks.resources, "files", lambda _: Path(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no judge weights.*python -m tools.sprites build"):
        SpritesJudge()


def test_shipped_weights_are_half_precision_and_small():
    for kind in ("reward", "judge"):
        path = (
            Path(sprites_networks.__file__).parents[1]
            / "data"
            / "sprites"
            / "weights"
            / f"{kind}.safetensors"
        )
        assert path.stat().st_size < 800_000
        with sprites_networks.safe_open(path, framework="pt") as archive:
            assert {archive.get_tensor(name).dtype for name in archive.keys()} == {torch.float16}  # noqa: SIM118


# Floors of the shipped weights for 256 clips, a little below what ``rank_report`` gives for 512. Ties in its
# truth (four levels) keep text_alignment's correlation below about 0.93 however good the network.
FLOORS = {
    "reward": {
        "visual_quality": 0.965,
        "temporal_consistency": 0.91,
        "dynamic_degree": 0.92,
        "text_alignment": 0.91,
        "factual_consistency": 0.94,
        "flicker": 0.965,
        "jitter": 0.965,
    },
    "judge": {
        "visual_quality": 0.965,
        "temporal_consistency": 0.91,
        "dynamic_degree": 0.92,
        "text_alignment": 0.91,
        "factual_consistency": 0.93,
        "flicker": 0.965,
        "jitter": 0.955,
    },
}


@pytest.mark.parametrize("kind", ["reward", "judge"])
@pytest.mark.long
def test_every_dimension_ranks_held_out_clips_by_its_own_damage(report, kind):
    reached = report[kind]["spearman"]
    assert set(reached) == set(FLOORS[kind])
    missed = {
        name: (value, FLOORS[kind][name]) for name, value in reached.items() if value < FLOORS[kind][name]
    }
    assert not missed


@pytest.mark.parametrize("kind", ["reward", "judge"])
@pytest.mark.long
def test_attributes_are_read_right(report, kind):
    accuracy = report[kind]["attribute_accuracy"]
    assert accuracy["colour"] >= 0.99
    assert accuracy["direction"] >= 0.99
    assert accuracy["shape"] >= 0.99


@pytest.mark.long
def test_clean_clips_are_good_in_every_dimension(report):
    for measures in report.values():
        assert all(value >= 3.93 for value in measures["clean_mean"].values())


def escapes(scorer, videos, captions) -> dict[str, int]:
    """Count the destroyed clips of each kind, which come in turn, that reach 2 in some dimension."""
    best = torch.stack([*scorer.score(videos, captions).values()]).amax(0)
    found = {kind: int((best[row :: len(DESTRUCTIONS)] >= 2).sum()) for row, kind in enumerate(DESTRUCTIONS)}
    return {kind: count for kind, count in found.items() if count}


MANY = 1233
counts = pytest.mark.parametrize("count", [144, pytest.param(MANY, marks=pytest.mark.long)])
"""Sixteen clips of each kind of destruction, so that a broken file is noticed quickly, or 137, for small shares."""


@functools.lru_cache(maxsize=1)
def wrecks(count: int) -> Clips:
    return sample_wrecks(count, seeded(HELD_OUT_SEED + 1))


def decoded_wrecks(count: int) -> torch.Tensor:
    vae = load_vae()
    return torch.cat([round_trip(vae, part) for part in wrecks(count).videos.split(64)])


@counts
def test_destroyed_clips_are_bad_in_every_dimension(scorer, count):
    """Of 144 clips none may escape."""
    found = escapes(scorer, wrecks(count).videos, wrecks(count).captions)
    assert sum(found.values()) <= 0.002 * count, found


@functools.lru_cache(maxsize=1)
def destroyed(count: int) -> Clips:
    return sample_destroyed(count, seeded(HELD_OUT_SEED + 1))


@counts
def test_destroyed_clips_that_chance_leaves_alike_to_sprites_are_few(scorer, count):
    """``sample_destroyed`` has such clips, tiles that hold the whole sprite above all; of 2034, 6 passed the reward."""
    found = escapes(scorer, destroyed(count).videos, destroyed(count).captions)
    assert sum(found.values()) <= 0.01 * count, found


@pytest.mark.long
def test_destroyed_clips_out_of_the_autoencoder_are_bad_too():
    """The reward falls short of the 0.002 aimed at: of 2034 clips 10 escaped it, and 3 the judge."""
    videos, captions = decoded_wrecks(MANY), wrecks(MANY).captions
    for scorer, share in ((SpritesReward(), 0.005), (SpritesJudge(), 0.002)):
        found = escapes(scorer, videos, captions)
        assert sum(found.values()) <= share * MANY, found


def test_each_kind_of_damage_lowers_its_own_dimension_most(scorer):
    attributes = Attributes.draw(64, seeded(5))
    clean = scorer.score(damaged(attributes, torch.zeros(64, 5), seeded(6)).videos, attributes.captions())
    own = (
        "temporal_consistency",
        "temporal_consistency",
        "visual_quality",
        "factual_consistency",
        "dynamic_degree",
    )
    for column, name in enumerate(own):
        severities = torch.zeros(64, len(KINDS))
        severities[:, column] = 0.9
        hurt = scorer.score(damaged(attributes, severities, seeded(6)).videos, attributes.captions())
        drop = {key: (clean[key] - hurt[key]).mean().item() for key in DIMENSIONS}
        assert max(drop, key=drop.__getitem__) == name, (KINDS[column], drop)
        assert drop[name] > 1.0, (KINDS[column], drop)


def test_a_wrong_caption_lowers_text_alignment_and_nothing_else(scorer):
    clips = sample_clean(128, seeded(7))
    own = scorer.score(clips.videos, clips.captions)
    wrong = scorer.score(clips.videos, mismatched_captions(clips.attributes, seeded(8)))
    assert (own["text_alignment"] > wrong["text_alignment"]).float().mean() > 0.9
    for name in set(DIMENSIONS) - {"text_alignment"}:
        assert torch.equal(own[name], wrong[name])


def test_reward_and_judge_agree_on_damaged_clips_but_are_not_the_same():
    attributes = Attributes.draw(256, seeded(9))
    severities = torch.rand(256, 5, generator=seeded(10)) * (torch.rand(256, 5, generator=seeded(11)) < 0.4)
    clips = damaged(attributes, severities, seeded(12))
    reward = sum(SpritesReward().score(clips.videos, clips.captions).values())
    judge = sum(SpritesJudge().score(clips.videos, clips.captions).values())
    assert 0.8 < spearman(reward, judge) < 0.9999


def test_scoring_is_quick_enough_for_a_training_step(scorer):
    """0.15 s for 64 clips on one core of a quiet server; five times that in each of five tries is the alarm."""
    clips = sample_clean(64, seeded(14))

    def taken() -> float:
        start = time.process_time()
        scorer.score(clips.videos, clips.captions)
        return time.process_time() - start

    assert any(taken() < 0.75 for _ in range(5))


def test_a_destroyed_clip_never_beats_a_clean_one_on_the_whole(scorer):
    clean, wreck = sample_clean(64, seeded(15)), sample_wrecks(64, seeded(16))
    good = torch.stack([*scorer.score(clean.videos, clean.captions).values()]).mean(0)
    bad = torch.stack([*scorer.score(wreck.videos, wreck.captions).values()]).mean(0)
    assert bad.max() < good.quantile(0.05)
