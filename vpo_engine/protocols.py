"""The few small contracts by which models, rewards, references and objectives meet in ``online_vpo.py``.

Shape letters: P prompts (pairs), N candidates per prompt, B rows (any flattening of them), L text tokens,
D text channels, C latent channels, T latent frames, H x W latent rows and columns, F video frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts.

    embeddings: [B, L, D], float. Rows of padding are whatever the encoder gave; the mask decides.
    mask: [B, L], bool, True where a token counts. On the CPU wherever the embeddings are: models read the
    lengths of captions from it, in every sampling step, and must not wait for a device.
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
        """Each row ``count`` times in a row: [B, ...] -> [B * count, ...]."""
        return TextEmbedding(
            self.embeddings.repeat_interleave(count, dim=0), self.mask.repeat_interleave(count, dim=0)
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbedding:
        """The embeddings elsewhere; the mask stays."""
        return TextEmbedding(self.embeddings.to(device, dtype), self.mask)

    @staticmethod
    def cat(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        return TextEmbedding(
            torch.cat([part.embeddings for part in parts]), torch.cat([part.mask for part in parts])
        )


Compile = Literal["none", "blocks", "graphs"]


@dataclass(frozen=True)
class SamplerSettings:
    """How noise becomes latents; see ``RolloutConfig``. The defaults behind guidance are no approximation."""

    steps: int
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    cache: float | None = None
    compile: Compile = "none"

    def guided_at(self, time: float) -> bool:
        """Whether guidance applies at a time from 0 (clean) to 1 (noise)."""
        low, high = self.guidance_interval or (0.0, 1.0)
        return low <= min(time, 1.0) <= high  # rounding can put pure noise an ulp above 1


@dataclass(frozen=True)
class Denoised:
    """What some or all steps of sampling made, each float32 [B, C, T, H, W].

    latents: at the time reached. preview: the clean latents that the last prediction points to; equal to ``latents``,
    but for rounding, after the last step.
    """

    latents: Tensor
    preview: Tensor


@runtime_checkable
class Replayed(Protocol):
    """A network that is told of calls that a device repeats without it."""

    def replayed(self) -> None:
        """The last call again, with other values."""
        ...


class Network(Protocol):
    """What predicts: the trained module itself, or a reference store standing in for it."""

    def __call__(self, *args: object, **kwargs: object) -> Tensor: ...


class VideoModel(Protocol):
    """A text-to-video model: everything the algorithm needs to know about the family it trains."""

    @property
    def network(self) -> nn.Module:
        """The policy: the only module that is trained."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one sample."""
        ...

    @property
    def fps(self) -> int:
        """Frames a second of the videos."""
        ...

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the text of these prompts, so that the text encoder is not needed afterwards."""
        ...

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        """Text embeddings of prepared prompts, [len(prompts), L, D], on the model's device."""
        ...

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        """The quantity the model is trained on (here the velocity), [B, C, T, H, W].

        latents [B, C, T, H, W] at time t [B] (in the schedule's units); text of B prompts. ``guidance`` other than
        1 gives the classifier-free guided prediction, both branches in one pass.
        """
        ...

    def draw_timesteps(self, u: Tensor) -> Tensor:
        """Uniform numbers in (0, 1), any shape, to training times of the schedule's distribution."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, the clean latents [B, ...] noised to time t [B]."""
        ...

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s), each [B], of x_t = a * latents + s * noise at times t [B]."""
        ...

    def target_scales(self, t: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """(a, b), numbers or [B]: a * latents + b * noise is what ``predict`` should have said at t [B]."""
        ...

    def sample(
        self, network: Network, noise: Tensor, text: TextEmbedding, *, steps: int, guidance: float
    ) -> Tensor:
        """Integrate from noise [B, C, T, H, W] to clean latents, one batched loop, without gradients.

        text: of P prompts, each that of B / P samples in a row.
        """
        ...

    def denoise(
        self,
        network: Network,
        latents: Tensor,
        text: TextEmbedding,
        settings: SamplerSettings,
        part: slice = slice(None),
    ) -> Denoised:
        """``sample``, or the ``part`` of its steps that follows from where ``latents`` [B, C, T, H, W] are."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, H, W] to video, uint8 [B, F, Hpx, Wpx, 3], without gradients."""
        ...

    def save_policy(self, folder: Path) -> None:
        """Write the policy in the layout that its own project loads."""
        ...


class Reward(Protocol):
    """A scorer of finished videos. Deterministic; raises rather than returning a number it cannot stand by."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of what is scored."""
        ...

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """uint8 videos [B, F, H, W, 3] and their B prompts to {dimension: float32 [B]}; higher is better."""
        ...


class ReferenceStore(Protocol):
    """How the frozen reference is stored."""

    @property
    def nbytes(self) -> int:
        """Bytes held by the stored reference."""
        ...

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """The reference network's forward, with the policy network's signature. Never builds a graph."""
        ...

    def refresh(self, policy: nn.Module) -> None:
        """reference <- policy."""
        ...

    def following(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """To be entered around every change of these parameters of the policy: the reference stays what it was."""
        ...

    def numbers(self) -> dict[str, float]:
        """For the log, by name: what the reference takes."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """What a forward reads beside the policy's trained weights, as the objects that are held."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
