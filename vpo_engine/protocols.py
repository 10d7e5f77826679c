"""The small interfaces through which models, rewards, references and objectives meet in ``online_vpo.py``.

The interface of models is in ``video_model.py``, and the values that pass through it are in ``model_values.py``. Shape
letters: B videos, F frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from vpo_engine.model_values import (
    Compile,
    Network,
    Replayed,
    SamplerSettings,
    SamplerState,
    TextEmbedding,
)

__all__ = [
    "Compile",
    "Gathered",
    "Network",
    "ReferenceStore",
    "Replayed",
    "Reward",
    "RewardWithGradients",
    "SamplerSettings",
    "SamplerState",
    "TextEmbedding",
    "at_hand",
]


Gathered = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Returns a context in which these parameters of the policy have their values, wherever they are kept."""


def at_hand(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """Return a context that does nothing, for a policy whose parameters are all here."""
    return nullcontext()


class Reward(Protocol):
    """A scorer of finished videos. It is deterministic, and raises an error where it has no valid score."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names of what is scored."""
        ...

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3] for their B prompts: {dimension: float32 [B]}, higher is better."""
        ...


@runtime_checkable
class RewardWithGradients(Reward, Protocol):
    """A reward whose scores have gradients with respect to the pixels."""

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1 for their B prompts: {dimension: float32 [B]}, with gradients."""
        ...


class ReferenceStore(Protocol):
    """A store of the frozen reference, which can run it and refresh it."""

    @property
    def nbytes(self) -> int:
        """The bytes that the stored reference takes."""
        ...

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Run the reference network, with the arguments of the policy network. It never builds a graph."""
        ...

    def refresh(self, policy: nn.Module, gathered: Gathered = at_hand) -> None:
        """Make the reference equal to the policy. ``gathered``: brings weights here that are on other processes."""
        ...

    def preserve(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Keep the reference as it is while these parameters of the policy change inside the context."""
        ...

    def numbers(self) -> dict[str, float]:
        """Return numbers for the log, by name, such as the bytes that the reference takes."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """Return what a forward pass reads beside the policy's trained weights, as the objects that are held."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
