"""The values that pass between the engine and a model: text, settings of the sampler, its state, costs.

Shape letters: P prompts, B samples (any batch of them), L text tokens, D text channels, C latent channels, T latent
frames, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts.

    embeddings: [B, L, D], float. Padding holds whatever the encoder gave; the mask decides what counts.
    mask: [B, L], bool, True where a token counts. It stays on the CPU wherever the embeddings are: models read the
    lengths of captions from it in every sampling step, and must not wait for a device.
    """

    embeddings: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", self.mask.cpu())

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def __getitem__(self, index: slice | Tensor) -> TextEmbedding:
        on_host = index.cpu() if isinstance(index, Tensor) else index
        return TextEmbedding(self.embeddings[index], self.mask[on_host])

    def repeat_interleave(self, count: int) -> TextEmbedding:
        """Repeat each prompt ``count`` times, next to each other: [B, ...] becomes [B * count, ...]."""
        return TextEmbedding(
            self.embeddings.repeat_interleave(count, dim=0), self.mask.repeat_interleave(count, dim=0)
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbedding:
        """Move the embeddings; the mask stays on the CPU."""
        return TextEmbedding(self.embeddings.to(device, dtype), self.mask)

    @staticmethod
    def cat(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """Join batches of equal L and D."""
        return TextEmbedding(
            torch.cat([part.embeddings for part in parts]), torch.cat([part.mask for part in parts])
        )


Compile = Literal["none", "blocks", "graphs"]


class SplitGuidance(Protocol):
    """Two processes that sample the same candidates, each with one of guidance's two branches.

    half: the half of a guided pass that this process computes, 0 or 1.
    """

    @property
    def half(self) -> int: ...

    def exchange(self, prediction: Tensor) -> Tensor:
        """Return the pass [2 B, ...], of which this process has computed its half, ``prediction`` [B, ...].

        Both processes must call this.
        """
        ...


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of how noise becomes latents; see ``RolloutConfig``. The defaults of all fields after guidance are
    exact.

    steps: of the whole loop, also where only a part of it is run. split: the two processes that share guided
    predictions; None: this one makes them alone.
    """

    steps: int
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    cache: float | None = None
    compile: Compile = "none"
    split: SplitGuidance | None = None

    def guided_at(self, noise_level: float) -> bool:
        """Return whether guidance applies at a noise level from 0 (clean) to 1 (pure noise)."""
        low, high = self.guidance_interval or (0.0, 1.0)
        return low <= min(noise_level, 1.0) <= high  # rounding can put pure noise an ulp above 1


@dataclass(frozen=True)
class SamplerState:
    """A batch of samples on their way from noise to clean latents. A loop can be cut here and resumed, bit for bit.

    latents: [B, C, T, H, W], float32 or better, after ``step`` steps.
    preview: [B, C, T, H, W], the clean latents that the last prediction points to. Before the first step it is the
        noise; after the last step it equals ``latents``, but for rounding.
    step: how many steps of the loop are done.
    memory: what a multistep solver remembers of earlier steps, each tensor [B, ...]. Empty for solvers of one step.
    """

    latents: Tensor
    preview: Tensor
    step: int = 0
    memory: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.latents.shape[0]

    def __getitem__(self, index: slice | Tensor) -> SamplerState:
        """Choose samples of the batch."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> SamplerState:
        """Apply ``function`` to every tensor: to move, reshape, gather or choose samples."""
        memory = tuple(function(tensor) for tensor in self.memory)
        return SamplerState(function(self.latents), function(self.preview), self.step, memory)

    @staticmethod
    def cat(parts: Sequence[SamplerState]) -> SamplerState:
        """Join batches that have done the same number of steps."""
        steps = {part.step for part in parts}
        assert len(steps) == 1, f"these samples have done different numbers of steps: {sorted(steps)}"
        memory = zip(*(part.memory for part in parts), strict=True)
        return SamplerState(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.preview for part in parts]),
            steps.pop(),
            tuple(torch.cat(tensors) for tensors in memory),
        )


class Network(Protocol):
    """A network that predicts: the trained module itself, or a reference store in its place."""

    def __call__(self, *args: object, **kwargs: object) -> Tensor: ...


@runtime_checkable
class Replayed(Protocol):
    """A network that wants to know of calls which a CUDA graph repeats without calling it."""

    def replayed(self) -> None:
        """Take note that the last call was made again, with other values."""
        ...


@runtime_checkable
class StepMemo(Protocol):
    """An argument of the network that the first call of a sampling loop fills, and that the later calls read."""

    @property
    def filled(self) -> bool:
        """Return whether the first call was made."""
        ...


@dataclass(frozen=True)
class RowFlops:
    """Floating point operations of one sample in one pass of the network.

    forward: a prediction. training: a prediction and its backward pass, with nothing computed twice.
    """

    forward: float
    training: float
