"""Train the sprites world's reward and judge on synthetic damage of known severity, and report how good they are.

Both learn to read severities, validity and attributes off rendered clips. 58 % of the clips are damaged (each
kind is active with probability 0.35, its severity uniform in 0..1), 30 % are destroyed and 12 % are cross-faded
with a destroyed one. Half of the damaged clips and most of the others go through ``round_trip``, the encoder and
decoder of an autoencoder, because clips that are scored later are decoded from latents. Without an autoencoder
``soften`` takes its place. Each epoch mirrors and reverses the clips differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.sprites.optimizers import MuonAndAdam
from vpo_engine.data.sprites.damage import (
    DESTRUCTIONS,
    KINDS,
    damaged,
    mismatched_captions,
    sample_destroyed,
    sample_wrecks,
)
from vpo_engine.data.sprites.world import SIZE, Attributes
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesJudge, SpritesReward, dimensions_of
from vpo_engine.rewards.sprites_networks import JudgeNetwork, Reading, RewardNetwork

RoundTrip = Callable[[Tensor], Tensor]
"""Maps uint8 clips [B, F, H, W, 3] to their reconstructions, of the same shape and type."""
Progress = Callable[[int, int, float], None]
"""Is called with the step, the number of steps and the loss."""

N = TypeVar("N", bound=nn.Module)

BATCH = 64
POOL = 7680
"""Training clips, a multiple of 256."""
REWARD_STEPS = 1000
JUDGE_STEPS = 1000
LEARNING_RATES = (0.02, 3e-3)
"""Of Muon and of Adam, see ``optimizers``."""
ACTIVE = 0.35
DESTROYED_SHARE = 0.3
FADED_SHARE = 0.12
WRECKS = (
    *DESTRUCTIONS,
    *("shuffled", "halves", "halves", "tiles", "tiles", "fragments"),
    *("crowd", "crowd", "crowd", "crowd"),
)
"""Kinds of destroyed clips, drawn in turn. Kinds that still show parts of sprites are harder, and come more often."""
THROUGH = (0.85, 0.5)
"""Shares of clips that go through the autoencoder: of destroyed or cross-faded ones, and of the others."""
CAUTION = 3.0
"""Extra weight of a destroyed clip where validity is learned, so that doubtful clips are refused."""
HELD_OUT_SEED = 2**40
"""Seed of the clips of the report. Seeds of training are small numbers."""


@dataclass(frozen=True)
class Batch:
    """Clips and their training targets."""

    videos: Tensor  # uint8 [B, F, H, W, 3]
    defects: Tensor  # [B, 6] severities and the degree of destruction
    defect_weight: Tensor  # [B, 6]
    attributes: Attributes
    attribute_weight: Tensor  # [B, 3] colour, shape, direction

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(
            self.videos[rows],
            self.defects[rows],
            self.defect_weight[rows],
            self.attributes[rows],
            self.attribute_weight[rows],
        )


def soften(videos: Tensor, generator: torch.Generator) -> Tensor:
    """Imitate an autoencoder's round trip: resize 32 -> 24 -> 32 px, and add noise (sigma 2 levels)."""
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2).float()
    small = F.interpolate(frames, size=24, mode="bilinear", antialias=True)
    frames = F.interpolate(small, size=SIZE, mode="bilinear")
    frames = frames + 2 * torch.randn(frames.shape, generator=generator)
    return frames.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(videos.shape)


def _draw_active(count: int, generator: torch.Generator) -> Tensor:
    active = torch.rand(count, len(KINDS), generator=generator) < ACTIVE
    return active * torch.rand(count, len(KINDS), generator=generator)


def _fade(videos: Tensor, destroyed: Tensor, share: Tensor) -> Tensor:
    """Cross-fade clips to destroyed ones by share [B] in 0..1."""
    weight = share.view(-1, 1, 1, 1, 1)
    return torch.lerp(videos.float(), destroyed.float(), weight).round().to(torch.uint8)


def _draw_batch(
    count: int, generator: torch.Generator, round_trip: RoundTrip | None, wrecks: Sequence[str] = WRECKS
) -> Batch:
    attributes = Attributes.draw(count, generator)
    severities = _draw_active(count, generator)
    videos = damaged(attributes, severities, generator).videos
    whole, faded = round(count * DESTROYED_SHARE), round(count * FADED_SHARE)
    invalid = torch.zeros(count)
    invalid[:whole] = 1
    invalid[whole : whole + faded] = torch.rand(faded, generator=generator)
    wreck = sample_wrecks(whole + faded, generator, wrecks).videos
    wreck = wreck[torch.randperm(whole + faded, generator=generator)]
    videos[: whole + faded] = _fade(videos[: whole + faded], wreck, invalid[: whole + faded])
    through = torch.rand(count, generator=generator) < torch.where(invalid > 0, *THROUGH)
    if through.any():
        videos[through] = round_trip(videos[through]) if round_trip else soften(videos[through], generator)
    valid = 1 - invalid
    same = valid * (1 - severities[:, KINDS.index("identity")])
    moving = valid * (1 - severities[:, KINDS.index("freeze")])
    return Batch(
        videos=videos,
        defects=torch.cat((severities, invalid.unsqueeze(1)), dim=1),
        defect_weight=torch.cat(
            (valid.unsqueeze(1).expand(-1, len(KINDS)), (1 + CAUTION * invalid).unsqueeze(1)), dim=1
        ),
        attributes=attributes,
        attribute_weight=torch.stack((same, same, moving), dim=1),
    )


def draw_pool(
    count: int, generator: torch.Generator, round_trip: RoundTrip | None, wrecks: Sequence[str] = WRECKS
) -> Batch:
    """Draw training clips for several epochs, once, because a round trip takes longer than a training step.

    ``count`` is a multiple of 256; ``wrecks`` names the kinds of destroyed clips.
    """
    parts = [_draw_batch(256, generator, round_trip, wrecks) for _ in range(count // 256)]
    return Batch(
        videos=torch.cat([part.videos for part in parts]),
        defects=torch.cat([part.defects for part in parts]),
        defect_weight=torch.cat([part.defect_weight for part in parts]),
        attributes=Attributes(
            colour=torch.cat([part.attributes.colour for part in parts]),
            shape=torch.cat([part.attributes.shape for part in parts]),
            direction=torch.cat([part.attributes.direction for part in parts]),
        ),
        attribute_weight=torch.cat([part.attribute_weight for part in parts]),
    )


def _loss(reading: Reading, batch: Batch) -> Tensor:
    """Return the summed cross-entropies of the defects (soft targets) and of the attributes, averaged over clips."""
    defects = F.binary_cross_entropy_with_logits(
        reading.defects, batch.defects, weight=batch.defect_weight, reduction="sum"
    )
    loss = defects / len(batch.attributes)
    pairs = (
        (reading.colour, batch.attributes.colour),
        (reading.shape, batch.attributes.shape),
        (reading.direction, batch.attributes.direction),
    )
    for (logits, index), weight in zip(pairs, batch.attribute_weight.unbind(1), strict=True):
        loss = loss + (F.cross_entropy(logits, index, reduction="none") * weight).mean()
    return loss


def _augmented(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirror half of the clips left to right, reverse half in time, and turn half of the destroyed ones upside down.

    A reversed sprite that changes identity begins with other attributes than those given; they get no weight.
    """
    mirrored, backwards, upside_down = torch.rand(3, len(batch.videos), generator=generator) < 0.5
    upside_down = upside_down & (batch.defects[:, -1] == 1)
    videos = batch.videos
    for chosen, axis in ((mirrored, 3), (backwards, 1), (upside_down, 2)):
        videos = torch.where(chosen.view(-1, 1, 1, 1, 1), videos.flip(axis), videos)
    direction = batch.attributes.direction  # left and right are 0 and 1, up and down 2 and 3
    opposite = backwards ^ (mirrored & (direction < 2))
    named = ~(backwards & (batch.defects[:, KINDS.index("identity")] > 0))
    weight = batch.attribute_weight * torch.stack((named, named, torch.ones_like(named)), dim=1)
    attributes = replace(batch.attributes, direction=torch.where(opposite, direction ^ 1, direction))
    return replace(batch, videos=videos, attributes=attributes, attribute_weight=weight)


def _train(network: N, steps: int, seed: int, round_trip: RoundTrip | None, progress: Progress | None) -> N:
    generator = torch.Generator().manual_seed(seed)
    optimizer = MuonAndAdam(network, steps, *LEARNING_RATES)
    pool = draw_pool(POOL, generator, round_trip)
    order = torch.cat([torch.randperm(POOL, generator=generator) for _ in range(steps * BATCH // POOL + 1)])
    for step in range(steps):
        batch = _augmented(pool[order[step * BATCH : (step + 1) * BATCH]], generator)
        loss = _loss(network(batch.videos), batch)
        optimizer.step(loss)
        if progress is not None:
            progress(step + 1, steps, loss.item())
    return network.eval().requires_grad_(False)


def train_reward(
    seed: int = 1, round_trip: RoundTrip | None = None, progress: Progress | None = None
) -> RewardNetwork:
    """Train the reward network from scratch, in about eight minutes on one core. Weights depend on the seed alone."""
    torch.manual_seed(seed)
    return _train(RewardNetwork(), REWARD_STEPS, seed, round_trip, progress)


def train_judge(
    seed: int = 1001, round_trip: RoundTrip | None = None, progress: Progress | None = None
) -> JudgeNetwork:
    """Train the judge from scratch, on other clips than the reward's. Weights depend on the seed alone."""
    torch.manual_seed(seed)
    return _train(JudgeNetwork(), JUDGE_STEPS, seed, round_trip, progress)


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 0 in float64; equal values share their mean rank."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts - 1) / 2)[index].double()


def spearman(one: Tensor, other: Tensor) -> float:
    """Return Spearman's rank correlation of two [n] tensors, with mean ranks for ties; 0 if one of them is constant."""
    pair = torch.stack((_ranks(one), _ranks(other)))
    pair = pair - pair.mean(1, keepdim=True)
    scale = pair.norm(dim=1).prod()
    return float((pair[0] * pair[1]).sum() / scale) if scale > 0 else 0.0


def _held_out(kinds: tuple[str, ...], count: int, generator: torch.Generator) -> Tensor:
    """Draw severities [count, 5], uniform in 0..1: the named kinds in every clip, each other kind in a quarter."""
    severities = torch.rand(count, len(KINDS), generator=generator)
    keep = torch.rand(count, len(KINDS), generator=generator) < 0.25
    keep[:, [KINDS.index(kind) for kind in kinds]] = True
    return severities * keep


OWN_DAMAGE: dict[str, tuple[str, ...]] = {
    "visual_quality": ("blur",),
    "temporal_consistency": ("flicker", "jitter"),
    "dynamic_degree": ("freeze",),
    "factual_consistency": ("identity",),
}


def _rank_correlations(
    scorer: SpritesReward | SpritesJudge, count: int, generator: torch.Generator, trip: RoundTrip
) -> dict[str, float]:
    """Return Spearman's correlation of each dimension with the truth; "flicker" and "jitter": with that kind alone."""
    cases = dict(OWN_DAMAGE, flicker=("flicker",), jitter=("jitter",))
    result = {}
    for name, kinds in cases.items():
        dimension = name if name in DIMENSIONS else "temporal_consistency"
        severities = _held_out(kinds, count, generator)
        for other in set(OWN_DAMAGE[dimension]) - set(kinds):
            severities[:, KINDS.index(other)] = 0
        clips = damaged(Attributes.draw(count, generator), severities, generator)
        truth = dimensions_of(severities, torch.ones(count), torch.ones(count))[dimension]
        result[name] = spearman(scorer.score(trip(clips.videos), clips.captions)[dimension], truth)
    severities = _held_out((), count, generator)
    severities[:, [KINDS.index("identity"), KINDS.index("freeze")]] = 0
    clips = damaged(Attributes.draw(count, generator), severities, generator)
    captions = clips.captions[: count // 2] + mismatched_captions(clips.attributes[count // 2 :], generator)
    said, shown = Attributes.of(captions), clips.attributes
    truth = torch.stack(
        [said.colour == shown.colour, said.shape == shown.shape, said.direction == shown.direction]
    ).sum(0)
    result["text_alignment"] = spearman(scorer.score(trip(clips.videos), captions)["text_alignment"], truth)
    return result


def _attribute_accuracy(
    network: nn.Module, count: int, generator: torch.Generator, trip: RoundTrip
) -> dict[str, float]:
    """Return the share of clips whose attributes are read right, with flicker, jitter and blur up to 0.5."""
    severities = 0.5 * _held_out((), count, generator)
    severities[:, [KINDS.index("identity"), KINDS.index("freeze")]] = 0
    clips = damaged(Attributes.draw(count, generator), severities, generator)
    with torch.no_grad():
        reading = network(trip(clips.videos))
    shown = clips.attributes
    return {
        "colour": float((reading.colour.argmax(1) == shown.colour).float().mean()),
        "shape": float((reading.shape.argmax(1) == shown.shape).float().mean()),
        "direction": float((reading.direction.argmax(1) == shown.direction).float().mean()),
    }


def _report(
    scorer: SpritesReward | SpritesJudge, count: int, round_trip: RoundTrip | None
) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    trip: RoundTrip = round_trip or (lambda videos: videos)
    wrecks = sample_destroyed(count, generator)
    destroyed = scorer.score(trip(wrecks.videos), wrecks.captions)
    worst = torch.stack([*destroyed.values()]).amax(0)
    clean = damaged(Attributes.draw(count, generator), torch.zeros(count, len(KINDS)), generator)
    return {
        "spearman": _rank_correlations(scorer, count, generator, trip),
        "attribute_accuracy": _attribute_accuracy(scorer.network, count, generator, trip),
        "clean_mean": {
            k: float(v.mean()) for k, v in scorer.score(trip(clean.videos), clean.captions).items()
        },
        "destroyed_max": {k: float(v.max()) for k, v in destroyed.items()},
        "destroyed_p95": {k: float(v.quantile(0.95)) for k, v in destroyed.items()},
        "destroyed_below_2": {"share": float((worst < 2).float().mean())},
    }


def rank_report(
    reward: nn.Module, judge: nn.Module, count: int = 512, round_trip: RoundTrip | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Test the networks on clips that they have not seen: {"reward" | "judge": {measure: {name: value}}}.

    spearman            rank correlation with the truth per dimension, over ``count`` clips with its own
                        damage uniform in 0..1 and each other kind in a quarter of them; also for flicker and
                        jitter alone. The truth of text_alignment is the number of right attributes; with four
                        levels it has many ties, which keep the correlation below 1
    attribute_accuracy  share of lightly damaged clips whose attributes are read right
    clean_mean          mean score of undamaged clips under their own captions
    destroyed_max, destroyed_p95, destroyed_below_2
                        largest and 95th percentile score of destroyed clips; share below 2 in every dimension

    With ``round_trip`` all clips go through it first.
    """
    return {
        "reward": _report(SpritesReward(reward), count, round_trip),
        "judge": _report(SpritesJudge(judge), count, round_trip),
    }
