"""Damage clips with known severity, as in videos from the web, and make clips that are completely destroyed.

Each of the five kinds of ``KINDS`` has a severity in [0, 1], which is exact because damage edits the ``Scene`` before
it is rendered. All kinds extend over several frames or several pixels, so they survive an autoencoder that compresses
4x in space and 4x in time, and a generative model can learn them.

flicker   the whole frame's brightness swings by +-40 % x severity, as a sine of 5 to 8 frames' period
jitter    the sprite is displaced by 3.2 px x severity, in another direction every 3 frames, which differs from the
          one before by at least a quarter turn
blur      Gaussian blur of the sprite, sigma 2.4 px x severity
identity  from some frame in the middle on, the sprite's colour is mixed with another colour in the proportion
          ``severity``; in half of the clips its outline is mixed with another shape in the same proportion
freeze    the sprite stands still for the fraction ``severity`` of the clip's duration, once, at a random time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpo_engine.data.sprites.world import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    SHAPES,
    SIZE,
    Attributes,
    Scene,
    draw_scene,
    rasterise,
    uniform,
)

KINDS = ("flicker", "jitter", "blur", "identity", "freeze")
FLICKER_GAIN = 0.4
JITTER_PX = 3.2
JITTER_HOLD_FRAMES = 3
BLUR_PX = 2.4
CLEAN_SHARE = 0.4
"""Share of the mixture's clips that have no damage."""
SINGLE_SHARE = 0.4
"""Share of the mixture's clips that have one kind of damage; the rest have two."""
MIXTURE_SEVERITY = (0.3, 1.0)
"""The severity of the mixture's damage is uniform in this range."""
DESTRUCTIONS = ("noise", "blotches", "grey", "empty", "shuffled", "halves", "tiles", "crowd", "fragments")
TILE_SHARE = 0.5
CROWD_AREA = 1.7
"""Limits from which tiles and overlaid sprites clearly count as destroyed, see ``_unmistakable``."""


@dataclass(frozen=True)
class Clips:
    """Rendered clips with their captions, damage and attributes."""

    videos: Tensor
    """uint8 [B, F, H, W, 3]"""
    captions: list[str]
    """B texts. They describe the clips, unless the caller has exchanged them."""
    severities: Tensor
    """float32 [B, 5], columns as KINDS."""
    attributes: Attributes
    """Colour, shape and direction that the clips show."""

    def __len__(self) -> int:
        return self.videos.shape[0]


def _flicker(scene: Scene, severity: Tensor, generator: torch.Generator) -> Scene:
    count = len(scene)
    period = uniform((count, 1), 5.0, 8.0, generator)
    phase = uniform((count, 1), 0.0, 1.0, generator)
    wave = torch.sin(2 * torch.pi * (torch.arange(FRAMES) / period + phase))
    return scene.changed(gain=scene.gain * (1 + FLICKER_GAIN * severity.unsqueeze(1) * wave))


def _jitter(scene: Scene, severity: Tensor, generator: torch.Generator) -> Scene:
    count = len(scene)
    places = (FRAMES - 1) // JITTER_HOLD_FRAMES + 2
    turn = uniform((count, places), 0.25, 0.75, generator)
    turn[:, 0] = torch.rand(count, generator=generator)
    angle = 2 * torch.pi * turn.cumsum(1)
    offset = torch.stack((torch.cos(angle), torch.sin(angle)), dim=2)  # [B, places, 2]
    lead = torch.randint(JITTER_HOLD_FRAMES, (count, 1), generator=generator)
    place = (torch.arange(FRAMES) + lead) // JITTER_HOLD_FRAMES  # [B, F]
    held = offset.gather(1, place.unsqueeze(2).expand(-1, -1, 2))
    return scene.changed(centre=scene.centre + JITTER_PX * severity.view(-1, 1, 1) * held)


def _identity(scene: Scene, severity: Tensor, generator: torch.Generator) -> Scene:
    count = len(scene)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    colour = (scene.rgb[:, :1] - palette).square().sum(2).argmin(1)
    colour = (colour + torch.randint(1, len(COLOURS), (count,), generator=generator)) % len(COLOURS)
    other = (scene.shape + torch.randint(1, len(SHAPES), (count,), generator=generator)) % len(SHAPES)
    also_shape = torch.randint(2, (count, 1), generator=generator)
    switch = torch.randint(FRAMES // 3, 2 * FRAMES // 3 + 1, (count, 1), generator=generator)
    share = (torch.arange(FRAMES) >= switch) * severity.unsqueeze(1)  # [B, F]
    rgb = torch.lerp(scene.rgb, palette[colour].unsqueeze(1), share.unsqueeze(2))
    return scene.changed(rgb=rgb, other_shape=other, morph=share * also_shape)


def _freeze(scene: Scene, severity: Tensor, generator: torch.Generator) -> Scene:
    still = (FRAMES - 1) * severity.unsqueeze(1)
    begin = torch.rand(len(scene), 1, generator=generator) * (FRAMES - 1 - still)
    time = torch.arange(FRAMES, dtype=torch.float32).unsqueeze(0)
    moving = torch.minimum(time, begin) + (time - begin - still).clamp_min(0)  # frames of motion so far
    velocity = (scene.centre[:, -1:] - scene.centre[:, :1]) / (FRAMES - 1)
    return scene.changed(centre=scene.centre + velocity * (moving - time).unsqueeze(2))


def apply(scene: Scene, severities: Tensor, generator: torch.Generator) -> Scene:
    """Damage clean scenes with severities [B, 5] (columns as KINDS); a kind with severity 0 changes nothing."""
    if severities.shape != (len(scene), len(KINDS)):
        raise ValueError(
            f"severities have shape {tuple(severities.shape)}, expected {(len(scene), len(KINDS))}: "
            f"a row for each clip, columns {list(KINDS)}"
        )
    if not bool(((severities >= 0) & (severities <= 1)).all()):
        raise ValueError("severities must lie in [0, 1]")
    flicker, jitter, blur, identity, freeze = severities.unbind(1)
    scene = _freeze(scene, freeze, generator)  # first: it reads the constant velocity
    scene = _jitter(scene, jitter, generator)
    scene = _identity(scene, identity, generator)
    scene = _flicker(scene, flicker, generator)
    return scene.changed(blur=BLUR_PX * blur)


def damaged(attributes: Attributes, severities: Tensor, generator: torch.Generator) -> Clips:
    """Render clips of the given sprites with the given severities [B, 5] and the captions that describe them."""
    videos = rasterise(apply(draw_scene(attributes, generator), severities, generator))
    return Clips(videos, attributes.captions(), severities, attributes)


def draw_severities(count: int, generator: torch.Generator) -> Tensor:
    """Draw severities [count, 5] of the mixture: a share CLEAN_SHARE is zero, SINGLE_SHARE has one kind, others two."""
    order = torch.rand(count, len(KINDS), generator=generator).argsort(dim=1).argsort(dim=1)
    dice = torch.rand(count, 1, generator=generator)
    kinds = (dice >= CLEAN_SHARE).long() + (dice >= CLEAN_SHARE + SINGLE_SHARE).long()
    return (order < kinds) * uniform((count, len(KINDS)), *MIXTURE_SEVERITY, generator)


def sample_mixture(count: int, generator: torch.Generator) -> Clips:
    """Draw captioned clips of the mixture, clean and damaged as videos from the web, uniform over the captions."""
    attributes = Attributes.draw(count, generator)
    return damaged(attributes, draw_severities(count, generator), generator)


def sample_clean(count: int, generator: torch.Generator) -> Clips:
    """Draw captioned clips without damage, uniform over the captions."""
    return damaged(Attributes.draw(count, generator), torch.zeros(count, len(KINDS)), generator)


def _stretch(small: Tensor) -> Tensor:
    """Resize noise [b, c, f, h, w] to frames [b, F, H, W, c] by trilinear interpolation."""
    large = torch.nn.functional.interpolate(small, size=(FRAMES, SIZE, SIZE), mode="trilinear")
    return large.permute(0, 2, 3, 4, 1)


def _tiles(videos: Tensor, generator: torch.Generator) -> Tensor:
    """Cut each clip into 4 x 4 tiles of 8 px, and put them together in another order."""
    count, side = videos.shape[0], SIZE // 4
    cut = videos.reshape(count, FRAMES, 4, side, 4, side, 3).permute(0, 2, 4, 1, 3, 5, 6)
    cut = cut.reshape(count, 16, FRAMES, side, side, 3)
    order = torch.rand(count, 16, generator=generator).argsort(dim=1)
    cut = torch.stack([clip[row] for clip, row in zip(cut, order, strict=True)])
    cut = cut.reshape(count, 4, 4, FRAMES, side, side, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return cut.reshape(videos.shape)


def _halves(count: int, generator: torch.Generator) -> Tensor:
    """Render sprites that are cut through the middle: one half is 4 to 7 px away, with another shape and colour."""
    first = draw_scene(Attributes.draw(count, generator), generator)
    second = draw_scene(Attributes.draw(count, generator), generator)
    gap = uniform((count, 1), 4.0, 7.0, generator) * (
        torch.randint(2, (count, 1), generator=generator) * 2 - 1
    )
    upright = torch.randint(2, (count, 1), generator=generator).bool()  # the cut
    apart = torch.stack((torch.where(upright, 0, gap), torch.where(upright, gap, 0)), dim=2)
    second = second.changed(centre=first.centre + apart, background=first.background, radius=first.radius)
    grid = torch.arange(SIZE, dtype=torch.float32)
    before_x = (grid.view(1, 1, 1, -1) < first.centre[..., 0, None, None]).expand(-1, -1, SIZE, -1)
    before_y = (grid.view(1, 1, -1, 1) < first.centre[..., 1, None, None]).expand(-1, -1, -1, SIZE)
    side = torch.where(upright.view(-1, 1, 1, 1), before_x, before_y).unsqueeze(-1)
    return torch.where(side, rasterise(first), rasterise(second))


def _crowd(videos: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three clips to be overlaid; the third is moved down by 9 px, and wraps around the edge."""
    return videos, others, others.flip(0).roll(9, 2)


def _wreck(kind: str, videos: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return destroyed versions, float [b, F, H, W, 3], of clips; ``others`` are as many unrelated clips."""
    count = videos.shape[0]
    clean = videos.float()
    if kind == "noise":
        return clean[:, :1, :1, :1] + 60 * torch.randn(clean.shape, generator=generator)
    if kind == "blotches":
        rows = int(torch.randint(4, 9, (1,), generator=generator))
        return 120 + 70 * _stretch(torch.randn(count, 3, 5, rows, rows, generator=generator))
    if kind == "grey":
        return uniform((count, 1, 1, 1, 1), 0, 255, generator).expand_as(clean)
    if kind == "empty":
        return clean[:, :, :1, :1].expand_as(clean)
    if kind == "shuffled":
        picks = torch.randint(count, (count, FRAMES), generator=generator)
        frames = torch.rand(count, FRAMES, generator=generator).argsort(dim=1)
        return torch.cat((clean, others.float()))[picks, frames]
    if kind == "halves":
        return _halves(count, generator).float()
    if kind == "tiles":
        return _tiles(clean, generator)
    if kind == "crowd":
        return torch.stack(_crowd(clean, others.float())).amax(0)
    assert kind == "fragments", kind
    shown = _stretch(torch.randn(count, 1, 5, 10, 10, generator=generator)) > 0.2
    return torch.where(shown, clean, clean[:, :, :1, :1])


def sample_destroyed(count: int, generator: torch.Generator) -> Clips:
    """Draw clips that must get a low score in every dimension, with each kind of DESTRUCTIONS in turn.

    The kinds are white noise; coloured blotches like decoded latent noise; a single grey; a background without a
    sprite; frames of many clips in random order; sprites made of two halves; tiles in random order; several sprites
    overlaid; sprites with missing pieces. Captions are those of sprites, and ``severities`` are all 1.
    ``sample_wrecks`` is stricter: it would draw about 6 % of these clips again.
    """
    base, others = sample_mixture(count, generator), sample_mixture(count, generator)
    videos = torch.empty_like(base.videos)
    for number, kind in enumerate(DESTRUCTIONS):
        rows = torch.arange(number, count, len(DESTRUCTIONS))
        if len(rows):
            wreck = _wreck(kind, base.videos[rows], others.videos[rows], generator)
            videos[rows] = wreck.clamp(0, 255).to(torch.uint8)
    return Clips(videos, base.captions, torch.ones(count, len(KINDS)), base.attributes)


def _light(videos: Tensor) -> Tensor:
    """Return each pixel's difference from the frame's background, the largest channel's, [b, F, H, W] in levels."""
    return (videos - videos[:, :, :1, :1]).abs().amax(-1)


def _unmistakable(kind: str, videos: Tensor, others: Tensor) -> Tensor:
    """Return which wrecks [b] of these clips, float [b, F, H, W, 3], do not look like sprite clips.

    The limits hold for the mean over the frames:
    tiles   the brightest tile shows at most TILE_SHARE of the sprite. A tile with nearly all of a small square or of a
            frozen sprite looks like a sprite again, even more so after an autoencoder (47 % fail)
    crowd   together the three sprites cover at least CROWD_AREA times the area of the largest. A sprite that hides the
            others looks like a single sprite (6 % fail)
    """
    if kind == "tiles":
        tiles = _light(videos).view(-1, FRAMES, 4, SIZE // 4, 4, SIZE // 4).sum(dim=(3, 5)).flatten(2)
        return (tiles.amax(2) / tiles.sum(2).clamp_min(1)).mean(1) <= TILE_SHARE
    if kind == "crowd":
        sprites = torch.stack([_light(clips) > 40 for clips in _crowd(videos, others)])
        largest = sprites.sum(dim=(3, 4)).amax(0).clamp_min(1)
        return (sprites.any(0).sum(dim=(2, 3)) / largest).mean(1) >= CROWD_AREA
    return torch.ones(len(videos), dtype=torch.bool)


def _draw_wrecks(kind: str, count: int, generator: torch.Generator) -> Clips:
    """Draw destroyed clips of one kind until ``count`` of them are unmistakable."""
    videos, shown, missing = [], [], count
    while missing:
        tries = max(8, missing + missing // 8)
        base, others = sample_mixture(tries, generator), sample_mixture(tries, generator).videos.float()
        rows = _unmistakable(kind, base.videos.float(), others).nonzero().squeeze(1)[:missing]
        wreck = _wreck(kind, base.videos, others, generator)[rows]
        videos.append(wreck.clamp(0, 255).to(torch.uint8))
        shown += [base.captions[row] for row in rows.tolist()]
        missing -= len(rows)
    return Clips(torch.cat(videos), shown, torch.ones(count, len(KINDS)), Attributes.of(shown))


def sample_wrecks(count: int, generator: torch.Generator, kinds: Sequence[str] = DESTRUCTIONS) -> Clips:
    """Draw destroyed clips like ``sample_destroyed``, with ``kinds`` in turn, none of which looks like a sprite clip.

    Tiles of which one still shows more than half of the sprite, and overlaid sprites of which one hides the others,
    are drawn again. Rewards are trained on these clips, and tested on those of ``sample_destroyed``.
    """
    turn = [kinds[row % len(kinds)] for row in range(count)]
    order = sorted(range(count), key=lambda row: turn[row])
    parts = [_draw_wrecks(kind, turn.count(kind), generator) for kind in sorted(set(turn))]
    back = torch.tensor(order).argsort()
    captions = [text for part in parts for text in part.captions]
    shown = Attributes.of([captions[row] for row in back.tolist()])
    videos = torch.cat([part.videos for part in parts])[back]
    return Clips(videos, shown.captions(), torch.ones(count, len(KINDS)), shown)


def mismatched_captions(attributes: Attributes, generator: torch.Generator) -> list[str]:
    """Draw for each clip a caption that is wrong in at least one of colour, shape and direction."""
    count = len(attributes)
    wrong = torch.rand(count, 3, generator=generator) < 0.5
    wrong[torch.arange(count), torch.randint(3, (count,), generator=generator)] = True

    def shift(column: int, index: Tensor, size: int) -> Tensor:
        return (index + wrong[:, column] * torch.randint(1, size, (count,), generator=generator)) % size

    return Attributes(
        shift(0, attributes.colour, len(COLOURS)),
        shift(1, attributes.shape, len(SHAPES)),
        shift(2, attributes.direction, len(DIRECTIONS)),
    ).captions()
