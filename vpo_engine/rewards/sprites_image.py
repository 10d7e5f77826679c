"""The sprites world's image scorer: single frames and their caption, nothing of motion.

What LAION's predictor and ImageReward are to natural video, in miniature: trained on the same damage as the video
reward, it knows of a frame how sharp it is, whether it shows a sprite at all ("valid"), and how likely the sprite has
the caption's colour and shape. Its one dimension (4 is best) is

    image    1 + 3 valid ((1 - blur) + mean probability of the caption's colour and shape) / 2

Flicker, jitter, freezing and the direction of motion cannot be in it; a change of identity is, once a frame
contradicts the caption. ``VideoOfFrames`` makes a ``Reward`` of it, the mean over frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpo_engine.data.sprites.world import SIZE, Attributes, parse_caption
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import check_finite, check_image_pixels, check_images
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.sprites_networks import load_network

CARD = RewardCard(
    name="sprites_image",
    dimensions={"image": (1.0, 4.0)},
    frames="one at a time",
    resolution=f"{SIZE} x {SIZE}; video files of enlarged clips are averaged down to it",
    reads_prompt=True,
    differentiable=True,
    parameters=101_724,
    licence="the engine's own",
    source="vpo_engine/data/sprites/weights",
)


class SpritesImage:
    """The scorer as an ``ImageScorer``. Deterministic for the same images in the same batch."""

    dimensions = tuple(CARD.dimensions)

    def __init__(self, network: nn.Module | None = None) -> None:
        """``network``: a trained ``FrameNetwork``; without it the package's weights are loaded."""
        self.network = load_network("image") if network is None else network

    @classmethod
    def from_pretrained(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SpritesImage:
        """Make the scorer with the package's weights, in float32 whatever the ``dtype``."""
        del dtype
        return cls(load_network("image").to(device))

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it is no caption of the sprites world."""
        return refusal(parse_caption, prompt)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why images of this size get no score, if there is a reason."""
        return refusal(_check_size, height, width)

    @torch.no_grad()
    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score uint8 images [n, 32 k, 32 k, 3], each pixel a square of k x k, with n captions.

        Return float32 [n] in 1..4.

        Raise ValueError for another shape or type, for a text that is no caption of the sprites world, and for a
        score that is not finite.
        """
        check_images(images, prompts)
        _check_size(*images.shape[1:3])
        return self._scores(images, prompts).cpu()

    def score_image_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score float images [n, 3, 32 k, 32 k] in 0..1 with n captions: [n] in 1..4 on their device, with gradients.

        Of pixels that are whole 255ths the scores are those of ``score_images`` but for rounding: nothing is rounded to
        bytes, and nothing is clamped. Raise ValueError as ``score_images`` does.
        """
        check_image_pixels(images, prompts)
        _check_size(*images.shape[2:])
        return self._scores(images.movedim(1, 3) * 255, prompts)

    def _scores(self, levels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score levels 0..255 of images, [n, 32 k, 32 k, 3]; return [n] on the network's device."""
        device = next(self.network.parameters()).device
        attributes = Attributes.of(prompts).to(device)
        defects, colour, shape = self.network(_small(levels.to(device)))
        blur, invalid = defects.sigmoid().unbind(1)
        match = (_probability(colour, attributes.colour) + _probability(shape, attributes.shape)) / 2
        scores = 1 + 3 * (1 - invalid) * ((1 - blur) + match) / 2
        check_finite(scores, prompts, CARD.name)
        return scores


def _check_size(height: int, width: int) -> None:
    if height != width or height % SIZE:
        raise ValueError(
            f"images are {height} x {width}, expected {SIZE} x {SIZE} or a whole multiple of it: this scorer "
            "knows clips of the sprites world only"
        )


def _small(images: Tensor) -> Tensor:
    """Reduce [n, 32 k, 32 k, 3] to [n, 32, 32, 3], by means of squares; those of bytes are rounded to bytes."""
    if images.shape[1] == SIZE:
        return images
    squares = images.unflatten(2, (SIZE, -1)).unflatten(1, (SIZE, -1))
    if images.is_floating_point():
        return squares.mean(dim=(2, 4))
    return squares.float().mean(dim=(2, 4)).round().to(images.dtype)


def _probability(logits: Tensor, index: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, index.unsqueeze(1)).squeeze(1)
