"""The sprites world: clips of one moving shape on a flat background, described by a caption and rendered by code.

A clip has ``FRAMES`` frames of ``SIZE`` x ``SIZE`` pixels. Coordinates are pixels, x to the right and y down,
and the centre of the top left pixel is (0, 0). A ``Scene`` has the numbers from which the frames are rendered;
``damage`` edits them before rendering. Everything is a function of tensors and an explicit ``torch.Generator``.
Letters: B clips, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FRAMES = 17
SIZE = 32
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (50, 185, 70),
    "blue": (60, 100, 240),
    "yellow": (245, 210, 50),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RADIUS = (5.0, 6.0)
"""Range of the sprite's radius, px: a square's side is 1.76 times its radius, a triangle's height 1.9 times."""
TRAVEL = (8.0, 11.0)
"""Range of the distance from the first frame's centre to the last one's, px."""
BACKGROUND = (35, 75)
"""Range of the background's grey level."""
EDGE = 2.0
"""The centre of a clean sprite is at least its radius plus this many px away from the edges of the picture."""
WITHHELD = 16


@dataclass(frozen=True)
class Sprite:
    """A sprite as a caption describes it."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


def all_sprites() -> list[Sprite]:
    """Return all 60 sprites; colour changes slowest, direction fastest."""
    return [Sprite(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def all_captions() -> list[str]:
    """Return all 60 captions, in the order of ``all_sprites``."""
    return [sprite.caption for sprite in all_sprites()]


_BY_CAPTION = {sprite.caption: sprite for sprite in all_sprites()}


def parse_caption(text: str) -> Sprite:
    """Return the sprite that a caption describes; ValueError for a text that is not in ``all_captions()``."""
    try:
        return _BY_CAPTION[text]
    except KeyError:
        raise ValueError(
            f"caption {text!r} is not one of the sprites world; expected 'a COLOUR SHAPE moving DIRECTION' "
            f"with COLOUR in {list(COLOURS)}, SHAPE in {list(SHAPES)}, DIRECTION in {list(DIRECTIONS)}"
        ) from None


def withheld_captions() -> list[str]:
    """Return the 16 captions that are used for evaluation only, not for preference training (pretraining uses them).

    Number k has colour k mod 5, shape k mod 3 and direction k mod 4. These are coprime, so the captions differ, and
    the values of each attribute occur equally often, up to one.
    """
    colours, directions = list(COLOURS), list(DIRECTIONS)
    return [Sprite(colours[k % 5], SHAPES[k % 3], directions[k % 4]).caption for k in range(WITHHELD)]


@dataclass(frozen=True)
class Attributes:
    """The attributes of B clips: int64 [B] indices into COLOURS, SHAPES and DIRECTIONS."""

    colour: Tensor
    shape: Tensor
    direction: Tensor

    def __len__(self) -> int:
        return self.colour.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Attributes:
        return Attributes(self.colour[index], self.shape[index], self.direction[index])

    def to(self, device: torch.device | str) -> Attributes:
        return Attributes(self.colour.to(device), self.shape.to(device), self.direction.to(device))

    def captions(self) -> list[str]:
        colours, directions = list(COLOURS), list(DIRECTIONS)
        rows = zip(self.colour.tolist(), self.shape.tolist(), self.direction.tolist(), strict=True)
        return [Sprite(colours[c], SHAPES[s], directions[d]).caption for c, s, d in rows]

    @staticmethod
    def of(captions: Sequence[str]) -> Attributes:
        """Return the attributes that captions describe; ValueError for an unknown caption."""
        colours, directions = list(COLOURS), list(DIRECTIONS)
        sprites = [parse_caption(text) for text in captions]
        return Attributes(
            torch.tensor([colours.index(s.colour) for s in sprites], dtype=torch.int64),
            torch.tensor([SHAPES.index(s.shape) for s in sprites], dtype=torch.int64),
            torch.tensor([directions.index(s.direction) for s in sprites], dtype=torch.int64),
        )

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Attributes:
        """Draw ``count`` sprites, uniformly from all 60."""

        def pick(size: int) -> Tensor:
            return torch.randint(size, (count,), generator=generator)

        return Attributes(pick(len(COLOURS)), pick(len(SHAPES)), pick(len(DIRECTIONS)))


@dataclass(frozen=True)
class Scene:
    """The numbers from which B clips are rendered; float32 unless stated otherwise."""

    centre: Tensor
    """[B, F, 2]: x and y of the sprite's centroid, px."""
    rgb: Tensor
    """[B, F, 3]: the sprite's colour, 0..255."""
    shape: Tensor
    """[B] int64: index into SHAPES."""
    other_shape: Tensor
    """[B] int64: the shape that is shown where ``morph`` is 1."""
    morph: Tensor
    """[B, F]: 0 shows ``shape``, 1 shows ``other_shape``; between them the outline is interpolated."""
    radius: Tensor
    """[B]: px."""
    background: Tensor
    """[B]: grey level, 0..255."""
    gain: Tensor
    """[B, F]: factor of the brightness of the whole frame."""
    blur: Tensor
    """[B]: standard deviation of a Gaussian blur, px; 0 means no blur."""

    def __len__(self) -> int:
        return self.radius.shape[0]

    def changed(self, **fields: Tensor) -> Scene:
        """Return a copy with some fields replaced."""
        return replace(self, **fields)


def uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw float32 numbers, uniform in [low, high)."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def draw_scene(attributes: Attributes, generator: torch.Generator) -> Scene:
    """Draw clean scenes of the given sprites, with random size, background, start and speed; the speed is constant."""
    count = len(attributes)
    radius = uniform((count,), *RADIUS, generator)
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[attributes.direction]  # [B, 2]
    travel = uniform((count, 1), *TRAVEL, generator) * heading
    margin = (radius + EDGE).unsqueeze(1)
    low = margin + (-travel).clamp_min(0)
    high = SIZE - 1 - margin - travel.clamp_min(0)
    start = low + (high - low) * torch.rand(count, 2, generator=generator)
    progress = torch.linspace(0, 1, FRAMES)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return Scene(
        centre=start.unsqueeze(1) + travel.unsqueeze(1) * progress.view(1, -1, 1),
        rgb=palette[attributes.colour].unsqueeze(1).repeat(1, FRAMES, 1),
        shape=attributes.shape,
        other_shape=attributes.shape,
        morph=torch.zeros(count, FRAMES),
        radius=radius,
        background=uniform((count,), *BACKGROUND, generator),
        gain=torch.ones(count, FRAMES),
        blur=torch.zeros(count),
    )


def _distance(shape: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return the signed distance to a shape's outline, px, negative inside; x [b, F, 1, W], y [b, F, H, 1]."""
    if SHAPES[shape] == "circle":
        return torch.sqrt(x.square() + y.square()) - radius
    if SHAPES[shape] == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    # Triangle, apex up: height 1.9, half base 1.2, centroid at the origin (all in radii).
    slope = (1.2**2 + 1.9**2) ** 0.5
    side = (1.9 / slope) * x.abs() - (1.2 / slope) * (y + radius * (1.9 * 2 / 3))
    return torch.maximum(side, y - radius * (1.9 / 3))


def _coverage(scene: Scene) -> Tensor:
    """Return the share of each pixel that the sprite covers, [B, F, H, W] in 0..1, antialiased over one pixel."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    x = grid.view(1, 1, 1, -1) - scene.centre[..., 0, None, None]
    y = grid.view(1, 1, -1, 1) - scene.centre[..., 1, None, None]
    radius = scene.radius.view(-1, 1, 1, 1)
    distance = torch.empty(len(scene), scene.centre.shape[1], SIZE, SIZE)
    changing = (scene.morph != 0).any(dim=1)
    for shape in range(len(SHAPES)):
        rows = (scene.shape == shape).nonzero().squeeze(1)
        distance[rows] = _distance(shape, x[rows], y[rows], radius[rows])
    for shape in range(len(SHAPES)):
        rows = (changing & (scene.other_shape == shape)).nonzero().squeeze(1)
        other = _distance(shape, x[rows], y[rows], radius[rows])
        distance[rows] = torch.lerp(distance[rows], other, scene.morph[rows][..., None, None])
    return distance.neg_().add_(0.5).clamp_(0, 1)


def _blur(coverage: Tensor, sigma: Tensor) -> Tensor:
    """Blur [b, F, H, W] with a Gaussian, one sigma > 0 (px) for each clip, by two small matrix products."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    offset = grid.view(1, -1) - grid.view(-1, 1)
    kernel = torch.exp(-offset.square() / (2 * sigma.view(-1, 1, 1).square()))
    full = torch.arange(-3 * SIZE, 3 * SIZE + 1, dtype=torch.float32)
    kernel = kernel / torch.exp(-full.square() / (2 * sigma.view(-1, 1).square())).sum(1).view(-1, 1, 1)
    kernel = kernel.unsqueeze(1)  # symmetric, [b, 1, H, H]
    return kernel @ coverage @ kernel


def rasterise(scene: Scene) -> Tensor:
    """Render scenes as clips, uint8 [B, F, SIZE, SIZE, 3]. Only the sprite is blurred; the background is flat."""
    coverage = _coverage(scene)
    blurred = (scene.blur > 0).nonzero().squeeze(1)
    coverage[blurred] = _blur(coverage[blurred], scene.blur[blurred])
    background = scene.background.view(-1, 1, 1) * scene.gain.unsqueeze(2)  # [B, F, 1]
    contrast = scene.rgb * scene.gain.unsqueeze(2) - background  # [B, F, 3]
    pixels = coverage.unsqueeze(-1) * contrast[:, :, None, None, :]
    return pixels.add_(background[:, :, None, None, :] + 0.5).clamp_(0, 255).to(torch.uint8)


def render(attributes: Attributes, generator: torch.Generator) -> Tensor:
    """Render clean clips of the given sprites, uint8 [B, F, SIZE, SIZE, 3]."""
    return rasterise(draw_scene(attributes, generator))
