"""The card of a reward model: what it declares about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RewardCard:
    """A scorer's contract, as ``python -m vpo_engine.rank --list`` prints it.

    dimensions: name to the range of its scores; None where a side has no bound. Higher is better in all of them.
    frames: the frames that are scored. resolution: the size that they are resized to. reads_prompt: whether the score
    depends on the text. differentiable: whether gradients can reach the pixels. parameters: of the published size;
    0 for none.
    licence: of weights and, where it differs, code. source: where the weights are published. for_training: whether
    pairs may be made of its scores; judges that write their answers are for ranking and evaluation alone.
    """

    name: str
    dimensions: Mapping[str, tuple[float | None, float | None]]
    frames: str
    resolution: str
    reads_prompt: bool
    differentiable: bool
    parameters: int
    licence: str
    source: str
    for_training: bool = True

    @property
    def gib_bf16(self) -> float:
        """Return the GiB that the weights take in bfloat16."""
        return 2 * self.parameters / GIB

    @property
    def gib_8bit(self) -> float:
        """Return the GiB that the weights take at a byte each; what stays in 16 bits comes on top."""
        return self.parameters / GIB


def image_card(
    name: str,
    bounds: tuple[float | None, float | None],
    *,
    parameters: int,
    licence: str,
    source: str,
    resolution: str = "224 x 224, centre crop",
    reads_prompt: bool = True,
) -> RewardCard:
    """Return the card of a differentiable scorer of single images with one dimension, called like the reward."""
    return RewardCard(
        name=name,
        dimensions={name: bounds},
        frames="one at a time",
        resolution=resolution,
        reads_prompt=reads_prompt,
        differentiable=True,
        parameters=parameters,
        licence=licence,
        source=source,
    )
