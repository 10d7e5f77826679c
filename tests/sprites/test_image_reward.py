"""Test the sprites world's image scorer: it scores what single frames show, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tools.sprites import train_image
from tools.sprites.train_image import train_image as train
from tools.sprites.train_rewards import HELD_OUT_SEED, soften, spearman
from vpo_engine.data.sprites.assets import load_vae, round_trip
from vpo_engine.data.sprites.damage import KINDS, damaged, sample_clean, sample_wrecks
from vpo_engine.data.sprites.world import Attributes
from vpo_engine.protocols import Reward
from vpo_engine.rewards import sprites_image, sprites_networks
from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.sprites import SpritesReward
from vpo_engine.rewards.sprites_image import CARD, SpritesImage
from vpo_engine.rewards.sprites_networks import FrameNetwork, load_network, save_network
from vpo_engine.runs.video import enlarge

COUNT = 128


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reward() -> VideoOfFrames:
    return VideoOfFrames(SpritesImage())


def hurt(kind: str, severity: float | torch.Tensor, seed: int):
    """Clips with one kind of damage only; the same sprites, places and paths for every kind of one seed."""
    severities = torch.zeros(COUNT, len(KINDS))
    severities[:, KINDS.index(kind)] = severity
    return damaged(Attributes.draw(COUNT, seeded(seed)), severities, seeded(seed + 1))


def test_it_is_a_reward_with_one_dimension_in_one_to_four_that_repeats_bit_for_bit(reward):
    protocol: Reward = reward
    assert protocol.dimensions == ("image",) == tuple(CARD.dimensions)
    clips = sample_clean(9, seeded(1))
    first, second = (reward.score(clips.videos, clips.captions)["image"] for _ in range(2))
    assert first.dtype == torch.float32
    assert first.min() >= 1
    assert first.max() <= 4
    assert torch.equal(first, second)


def test_the_order_of_frames_changes_nothing(reward):
    clips = hurt("jitter", 1.0, 2)
    videos, captions = clips.videos[:16], clips.captions[:16]
    own = reward.score(videos, captions)["image"]
    order = torch.randperm(videos.shape[1], generator=seeded(3))
    # The same numbers in other batches and another order: a mean of 17 may round differently.
    torch.testing.assert_close(reward.score(videos[:, order], captions)["image"], own, atol=2e-5, rtol=0)
    moved = SpritesReward().score(videos[:, order], captions)["temporal_consistency"]
    assert (SpritesReward().score(videos, captions)["temporal_consistency"] - moved).abs().mean() > 0.1


def test_the_direction_in_the_caption_is_not_read(reward):
    clips = sample_clean(12, seeded(4))
    attributes = clips.attributes
    turned = Attributes(attributes.colour, attributes.shape, (attributes.direction + 1) % 4).captions()
    assert torch.equal(
        reward.score(clips.videos, clips.captions)["image"], reward.score(clips.videos, turned)["image"]
    )


decoded = pytest.mark.parametrize(
    "through_the_autoencoder", [False, pytest.param(True, marks=pytest.mark.long)]
)


@decoded
def test_it_ranks_clips_by_their_blur(reward, through_the_autoencoder):
    severity = torch.rand(COUNT, generator=seeded(5))
    clips, few = hurt("blur", severity, 6), slice(0, COUNT // 2)
    videos = round_trip(load_vae(), clips.videos[few]) if through_the_autoencoder else clips.videos[few]
    assert spearman(reward.score(videos, clips.captions[few])["image"], -severity[few]) > 0.93


@pytest.mark.parametrize("kind", ["jitter", "freeze"])
def test_it_cannot_see_damage_to_motion(reward, kind):
    """As rendered: an autoencoder over time smears what jumps, and that a frame does show."""
    severity = torch.rand(COUNT, generator=seeded(7))
    clips = hurt(kind, severity, 8)
    assert abs(spearman(reward.score(clips.videos, clips.captions)["image"], severity)) < 0.25
    dimension = {"jitter": "temporal_consistency", "freeze": "dynamic_degree"}[kind]
    assert spearman(SpritesReward().score(clips.videos, clips.captions)[dimension], -severity) > 0.9


@pytest.mark.parametrize(("kind", "drop"), [("blur", 1.0), ("identity", 0.4)])
def test_what_frames_show_lowers_it(reward, kind, drop):
    """A change of identity shows where later frames contradict the caption."""
    clean, bad = hurt(kind, 0.0, 9), hurt(kind, 0.9, 9)
    lost = (
        reward.score(clean.videos, clean.captions)["image"] - reward.score(bad.videos, bad.captions)["image"]
    )
    assert lost.mean() > drop


def test_a_wrong_colour_or_shape_lowers_it(reward):
    clips = sample_clean(64, seeded(10))
    shown = clips.attributes
    own = reward.score(clips.videos, clips.captions)["image"]
    assert own.min() > 3.7
    for wrong in (
        Attributes((shown.colour + 1) % 5, shown.shape, shown.direction),
        Attributes(shown.colour, (shown.shape + 1) % 3, shown.direction),
    ):
        assert (own - reward.score(clips.videos, wrong.captions())["image"]).min() > 0.5


@decoded
def test_destroyed_frames_are_bad(reward, through_the_autoencoder):
    kinds = [kind for kind in train_image.WRECKS if kind != "shuffled"]
    clips = sample_wrecks(len(kinds) * 2, seeded(HELD_OUT_SEED), kinds)
    videos = round_trip(load_vae(), clips.videos) if through_the_autoencoder else clips.videos
    assert reward.score(videos, clips.captions)["image"].max() < 2


def test_enlarged_frames_score_as_the_frames(reward):
    clips = sample_clean(2, seeded(11))
    images = clips.videos[:, 8]
    scorer = SpritesImage()
    small = scorer.score_images(images, clips.captions)
    assert torch.equal(scorer.score_images(enlarge(images, 3), clips.captions), small)


IMAGE = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
CAPTION = "a red circle moving left"


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (IMAGE.float(), [CAPTION], "expected torch.uint8"),
        (IMAGE[:, :31], [CAPTION], "images are 31 x 32, expected 32 x 32 or a whole multiple"),
        (IMAGE[:, :31, :31], [CAPTION], "images are 31 x 31"),
        (IMAGE, [], "0 prompts for 1 images"),
        (IMAGE, ["a red dog moving left"], "'a red dog moving left' is not one of the sprites world"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        SpritesImage().score_images(images, prompts)


def test_a_network_gone_bad_stops_the_run_instead_of_scoring():
    network = load_network("image")
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="sprites_image gave nan for input 0"):
        SpritesImage(network).score_images(IMAGE, [CAPTION])


def test_the_shipped_weights_are_small_and_those_of_the_card(tmp_path):
    path = Path(sprites_image.__file__).parents[1] / "data" / "sprites" / "weights" / "image.safetensors"
    assert path.stat().st_size < 250_000
    network = load_network("image")
    assert isinstance(network, FrameNetwork)
    assert sum(p.numel() for p in network.parameters()) == CARD.parameters
    save_network(network, tmp_path / "image.safetensors")
    assert (tmp_path / "image.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="holds network 'image', expected 'reward'"):
        load_network("reward", tmp_path / "image.safetensors")
    with sprites_networks.safe_open(path, framework="pt") as archive:
        assert {archive.get_tensor(name).dtype for name in archive.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.long
def test_training_is_a_function_of_the_seed_and_uses_the_round_trip(monkeypatch):
    monkeypatch.setattr(train_image, "POOL", 256)
    monkeypatch.setattr(train_image, "STEPS", 3)
    trips = []

    def trip(videos):
        trips.append(len(videos))
        return soften(videos, seeded(12))

    seen = []
    one, other = (train(3, trip, lambda step, steps, loss: seen.append((step, steps, loss))) for _ in "ab")
    assert [step for step, steps, _ in seen] == [1, 2, 3] * 2
    assert seen[:3] == seen[3:]
    assert all(130 < count < 200 for count in trips)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
