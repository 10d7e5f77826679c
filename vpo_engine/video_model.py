"""The interface of a model family: everything that the engine may ask of the model it trains.

A family is a class that derives from ``VideoModel``; ``vpo_engine.models.base.BaseModel`` has what most families
share. ``vpo_engine.models.registry`` finds the class by ``model.kind``. docs/models.md shows how to write one. Shape
letters are those of ``model_values.py``; F, height and width are frames, rows and columns of a video in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from vpo_engine.config import MemoryConfig, ModelConfig
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.memory.idle_offload import IdleOffload, PartName
from vpo_engine.model_loading import Encoder as Encoder
from vpo_engine.model_loading import LoadContext as LoadContext
from vpo_engine.model_loading import MakeTextSource as MakeTextSource
from vpo_engine.model_loading import ReadConfig as ReadConfig
from vpo_engine.model_loading import TextSource as TextSource
from vpo_engine.model_values import Network, RowFlops, SamplerSettings, SamplerState, TextEmbedding
from vpo_engine.size_rule import SizeRule as SizeRule

Padding = Literal["masked", "zeros", "attended"]
Option = Literal[
    "model.height",
    "model.width",
    "model.flow_shift",
    "model.negative_prompt",
    "model.attention",
    "model.fused_ops",
    "memory.activation_checkpointing",
    "memory.offload_activations",
    "memory.mlp_chunks",
    "memory.decode_frames",
    "memory.decode_strip_height",
    "rollout.guidance",
    "rollout.guidance_interval",
    "rollout.cache",
    "rollout.compile=blocks",
    "rollout.compile=graphs",
    "rollout.prune.frames",
    "method=reward_gradient",
    "distributed.sequence_parallel",
    "processes.split_guidance",
]
"""Settings that need the help of the model. ``registry.check_model`` refuses those that a family does not support."""


@dataclass(frozen=True)
class TextRule:
    """The rules by which the model reads text.

    max_tokens: the longest prompt, in tokens. channels: D. padding: ``masked`` padding is never computed on, so a batch
    is cut to its longest prompt; ``zeros`` fill every prompt up to max_tokens and are attended to; ``attended`` padding
    is what the encoder makes of it, and the encoder's mask is True everywhere.
    """

    max_tokens: int
    channels: int
    padding: Padding = "masked"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The facts about every model of a family that are known before any file is read.

    name: the name that people read. files: the settings of ``model`` that must name local folders or files.
    lora_targets: ends of the names of the linear layers that get an adapter, unless ``model.lora.targets`` names
    others. lora_target_sets: names that ``model.lora.targets`` may give instead, each for a list of ends. sizes: see
    ``SizeRule``.
    resolutions: the values of ``model.resolution`` for which ``vpo_engine.plan`` searches the most frames; none where
    videos have one size. pipelines: the classes of diffusers pipelines whose folders are of this family.
    run_policy: the command of the project's own code that samples from a policy in the folder ``policy``; "" if there
    is none.
    supports: the options that the family has. float32_modules: names of modules and parameters, at any depth, whose
    weights stay float32 where ``memory.weights`` holds the others in bfloat16; the network has to cast what passes
    their borders, as diffusers' transformers do. native: settings with which a published folder is sampled unless
    others are given, such as model.num_frames, rollout.steps and rollout.guidance.
    """

    name: str
    files: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    lora_target_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: SizeRule = field(default_factory=SizeRule)
    resolutions: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    run_policy: str = ""
    supports: frozenset[Option] = frozenset({"rollout.guidance", "rollout.guidance_interval"})
    float32_modules: tuple[str, ...] = ()
    native: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, for the planner. All parameters and buffers are on the meta device.

    model: its ``prepare`` and ``embed`` are not called. depth: blocks in each list of repeating blocks as the
    configuration has them, whatever depth was asked for. text_encoder: makes the encoder, which is called as those of
    transformers are, with input_ids and attention_mask; None where text costs nothing.
    """

    model: VideoModel
    depth: int
    text_encoder: Callable[[], nn.Module] | None = None


class Solver(Protocol):
    """A way from noise to clean latents in a given number of steps.

    Steps are numbered from 0. ``memory`` is what earlier steps left behind, () before the first; each tensor of it is
    [B, ...], and nothing else may be remembered.
    """

    @property
    def times(self) -> Sequence[float]:
        """Return the time of each step, at which the network is asked, in the units of the model's schedule."""
        ...

    def noise_level(self, step: int) -> float:
        """Return how noisy the latents are before ``step``, from 0 (clean) to 1 (pure noise)."""
        ...

    def advance(
        self, step: int, latents: Tensor, prediction: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the latents after ``step``, and the new memory."""
        ...

    def preview(self, step: int, before: Tensor, after: Tensor, prediction: Tensor) -> Tensor:
        """Return the clean latents that ``prediction`` points to, made in ``step`` from ``before`` to ``after``."""
        ...


class VideoModel(ABC):
    """A text-to-video model: the policy that is trained, with everything around it.

    network: the policy, the only module that is trained. Its repeating blocks are the members of the lists
        (nn.ModuleList) that are its attributes; see ``repeating_blocks``. Nothing in its forward pass may be random.
    latent_shape: (C, T, H, W) of one sample. fps: frames a second of the videos. text_rule: see ``TextRule``.
    video_size: (frames, height, width) of the videos that ``decode`` makes, by which a run sees at its start whether
        its reward scores them; None where that is not known.
    device, dtype: where the model is, and its arithmetic. idle_offload: says what is on the device; see ``stay_by``.
    """

    card: ClassVar[ModelCard]
    network: nn.Module
    latent_shape: tuple[int, int, int, int]
    video_size: tuple[int, int, int] | None = None
    fps: int
    text_rule: TextRule
    device: torch.device
    dtype: torch.dtype
    idle_offload: IdleOffload

    # --- before anything is loaded -------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check(cls, settings: ModelConfig) -> None:
        """Raise ValueError for settings that the family cannot run with. No file is read."""

    @classmethod
    @abstractmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        """Load the model. Errors name the file and what is wrong with it."""

    @classmethod
    @abstractmethod
    def blueprint(cls, settings: ModelConfig, read: ReadConfig, depth: int | None = None) -> Blueprint | None:
        """Return the model without weights, or None if the family cannot be planned.

        depth: blocks in each list of repeating blocks; None: as configured.
        """

    @classmethod
    def readable_part(cls, settings: ModelConfig, prompt: str) -> str:
        """Return what the model can read of a prompt: what the family's preparation of texts leaves of it, without what
        it adds to all of them. A run with a prompt of which no letter is left does not start. By default, all of it.
        """
        return prompt

    @classmethod
    def size_settings(cls, height: int, width: int) -> dict[str, Any]:
        """Return the settings of ``model`` that make videos of this size in pixels.

        Raise ValueError, naming the nearest possible size, for one that the family cannot represent.
        """
        if "model.height" not in cls.card.supports:
            raise ValueError(f"the size of the videos of {cls.card.name} is not a setting; leave it out")
        cls.card.sizes.check_sides(height, width)
        return {"height": height, "width": width}

    @classmethod
    def original_name(cls, name: str) -> str | None:
        """Return the name that a module has in the model's first project, for adapters in its format.

        name: the network's own name of a linear layer. None, the default, if there is no other name.
        """
        return None

    # --- text ----------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the text of these prompts, so that the text encoder is not needed afterwards."""

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        """Return text embeddings of prepared prompts, [len(prompts), L, D], on the model's device."""

    @abstractmethod
    def null_text(self, text: TextEmbedding) -> TextEmbedding:
        """Return the text of guidance's second prediction: no caption or a negative prompt, in the shape of
        ``text``."""

    # --- what the network predicts -------------------------------------------------------------------------

    @abstractmethod
    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        """Return the quantity the model is trained on (velocity, v or epsilon), float32 [B, C, T, H, W].

        latents [B, C, T, H, W] at time t [B], in the units of the schedule. text: of P prompts, each that of B / P
        samples next to each other. A guidance other than 1 gives the classifier-free guided prediction.
        """

    @abstractmethod
    def draw_timesteps(self, u: Tensor) -> Tensor:
        """Map uniform numbers in (0, 1), of any shape, to training times of the schedule's distribution."""

    @abstractmethod
    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, s), each [B], of x_t = a * latents + s * noise at times t [B]."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, the clean latents [B, ...] noised to time t [B]."""

    @abstractmethod
    def target_scales(self, t: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Return (a, b), numbers or [B]: ``predict`` should give a * latents + b * noise at times t [B]."""

    # --- sampling ------------------------------------------------------------------------------------------

    @abstractmethod
    def solver(self, steps: int) -> Solver:
        """Return the way from noise to clean latents in ``steps`` steps."""

    @abstractmethod
    def start(self, noise: Tensor) -> SamplerState:
        """Return the state before the first step, from noise [B, C, T, H, W]."""

    def start_from(self, latents: Tensor, noise: Tensor, steps: int, step: int) -> SamplerState:
        """Return the state before ``step`` of a loop of ``steps`` steps that begins with noised clean latents.

        latents, noise: [B, C, T, H, W]. The latents are noised to the level that the loop has before this step. A
        solver of several steps remembers nothing there, as at the beginning of a whole loop.
        """
        raise ValueError(
            f"{self.card.name} has no start_from, so its sampling cannot begin with a given video"
        )

    @abstractmethod
    def denoise(
        self,
        network: Network,
        state: SamplerState,
        text: TextEmbedding,
        settings: SamplerSettings,
        stop: int | None = None,
    ) -> SamplerState:
        """Go on from ``state`` until ``stop`` steps of ``settings.steps`` are done (None: all), without gradients.

        text: of P prompts, each that of B / P samples next to each other. A loop that is cut and resumed with the same
        settings and batch gives the same latents as one that is not, bit for bit (settings.cache apart).
        """

    @abstractmethod
    def sample(
        self, network: Network, noise: Tensor, text: TextEmbedding, *, steps: int, guidance: float
    ) -> Tensor:
        """Return clean latents [B, C, T, H, W] from noise: a whole ``denoise`` without any approximation."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents [B, C, T, H, W] into videos, uint8 [B, F, height, width, 3], without gradients."""

    def encode(self, videos: Tensor) -> Tensor:
        """Turn videos of the model's size, uint8 [B, F, height, width, 3], into clean latents, float32 [B, C, T, H, W].

        No gradients, no random numbers: where the VAE gives a distribution, its most likely latents. ValueError for
        families that do not encode, and for videos of another size.
        """
        raise ValueError(f"{self.card.name} does not encode videos; give their latents")

    def decode_pixels(self, latents: Tensor, frames: Sequence[int] | None = None) -> Tensor:
        """Turn latents [B, C, T, H, W] into pixels, float32 [B, F, 3, height, width] in 0..1, with gradients.

        The layout is that of a reward's ``score_pixels``. frames: the numbers of the frames that are wanted, in the
        order of the result; None: all. Nothing is decoded that they do not depend on. What the decoder gives beyond
        0..1 is clamped and passes no gradient, as in the public code of ReFL, VADER and InstructVideo. The decoder's
        activations are computed again in the backward pass, tile by tile.

        The caller keeps the VAE on the device until the backward pass is over (phase "reward_gradient" of the offload
        of idle parts). Only families that support "method=reward_gradient" are asked; others raise ValueError.
        """
        raise ValueError(
            f"{self.card.name} does not decode with gradients; define decode_pixels in its family and add "
            '"method=reward_gradient" to what its card supports, or train it with method=online_vpo'
        )

    @classmethod
    def real_video(cls, prompt: str, generator: torch.Generator) -> Tensor | None:
        """Return a video of a prompt that no model made, uint8 [F, height, width, 3], if the family can draw one.

        Only worlds whose videos are drawn by code can; by default there is none.
        """
        return None

    def prefix(self, frames: int) -> tuple[int, int]:
        """Return (latent frames, frames) of the shortest beginning of a video that has at least ``frames`` frames and
        can be decoded on its own: ``decode`` of the first latent frames gives the first frames of the whole video.

        Only families that support ``rollout.prune.frames`` are asked. By default, a latent frame stands for each group
        of frames of ``card.sizes``, and one more for the frames before the first group.
        """
        rule = self.card.sizes
        groups = max(0, -(-(frames - rule.frame_offset) // rule.frame_step))
        return groups + (rule.frame_offset > 0), rule.frames(groups)

    # --- memory, speed and files ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def parts(self) -> Mapping[PartName, nn.Module]:
        """Return the modules that are moved and planned as one: "policy", which is the network, and "vae"."""

    @property
    @abstractmethod
    def decoders(self) -> Sequence[nn.Module]:
        """Return the modules that ``decode`` calls repeatedly with equal shapes; the planner traces one call each."""

    @abstractmethod
    def use_memory(self, memory: MemoryConfig) -> None:
        """Take over the settings among ``Option`` that the family supports; the others have been refused."""

    @abstractmethod
    def choose_backends(self, settings: ModelConfig) -> str:
        """Choose the implementations of attention and fused ops; return a line for the user, "" for no choice."""

    def share_sequence(self, group: SequenceGroup) -> None:
        """Let the network compute on slices of videos, which the processes of ``group`` hold, from now on.

        Each of them gives ``predict`` the same whole latents, and gets the whole prediction; parameters get the
        gradients of this process's slice. Copies of the network do the same. Only families that support
        distributed.sequence_parallel are asked. Raise ValueError if there are more processes than slices.
        """
        raise AssertionError(f"{self.card.name} does not support distributed.sequence_parallel")

    @abstractmethod
    def stay_by(self, idle_offload: IdleOffload) -> None:
        """Let ``idle_offload`` say when each of ``parts`` is on the device."""

    @abstractmethod
    def row_flops(self, text: TextEmbedding) -> RowFlops | None:
        """Return the cost of one sample, or None: the engine then counts a ``predict`` on tensors without values."""

    @abstractmethod
    def save_policy(self, folder: Path) -> None:
        """Write the policy in the layout that its own project loads; of a policy with an adapter, the adapter."""

    @abstractmethod
    def load_policy(self, folder: Path) -> None:
        """Put back, bit for bit, what ``save_policy`` of the same configuration wrote."""


def repeating_blocks(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of a module by name: their members are the blocks that repeat."""
    found: dict[str, nn.ModuleList] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return found
