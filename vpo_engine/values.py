"""The three values that travel through a step: prompts, their candidates, and the pairs made of them.

Each is complete in itself: a candidate knows its prompt, a pair knows its candidates, so that nothing has to be kept
aligned beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpo_engine.errors import NotFiniteError
from vpo_engine.protocols import TextEmbedding


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt of a step.

    text: the prompt as it stands in the prompt file. embedding: its text embedding, [1, L, D]; L is the same for all
    prompts of a step. position: its place in the prompt stream, which seeds all its random numbers.
    """

    text: str
    embedding: TextEmbedding
    position: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """A video that was sampled for a prompt.

    number: its number among the prompt's candidates, which with the seed and the prompt's position gives its noise.
    latents: clean latents [C, T, H, W]. scores: {dimension: float32 as a Python float}.
    """

    prompt: Prompt
    number: int
    latents: Tensor
    scores: dict[str, float]


@dataclass(frozen=True, eq=False)
class Choice:
    """The best and the worst of one prompt's candidates.

    candidates: all that were compared, in the order of their numbers. selected: the one number that each candidate's
    scores became. gap: the winner's number minus the loser's. tied: the gap is too small to learn from.
    """

    candidates: tuple[Candidate, ...]
    selected: tuple[float, ...]
    winner: Candidate
    loser: Candidate
    gap: float
    tied: bool

    @property
    def prompt(self) -> Prompt:
        return self.winner.prompt


@dataclass(frozen=True, eq=False)
class Pair:
    """A winner and a loser to learn from; no tie.

    gap: the score gap between them. weight: the factor of the pair's loss; weights have mean 1 over all pairs of the
    step, on all processes.
    """

    winner: Candidate
    loser: Candidate
    gap: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        assert self.winner.prompt is self.loser.prompt, "winner and loser belong to one prompt"

    @property
    def prompt(self) -> Prompt:
        return self.winner.prompt


def stacked_embeddings(prompts: Sequence[Prompt]) -> TextEmbedding:
    """Return the embeddings of prompts of one step, [P, L, D]."""
    return TextEmbedding.cat([prompt.embedding for prompt in prompts])


def check_latents(latents: Tensor) -> Tensor:
    """Return sampled latents; NotFiniteError if one is not finite, which the decoder would be blamed for."""
    if not torch.isfinite(latents).all():
        raise NotFiniteError("the policy samples latents that are not finite")
    return latents
