"""The shipped weights of the sprites world, and the ``VideoModel`` they make.

Each part lies in a folder of its own, in its project's published layout: ``config.json`` and ``model.safetensors``
(half precision; loaded as float32) in ``weights/policy``, ``weights/vae`` and ``weights/text_encoder``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vpo_engine.config import ModelConfig
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.sprites.world import FRAMES, SIZE, Attributes, render
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.checkpoint import load_config, load_strict, save_pretrained_layout
from vpo_engine.models.opensora.model import Geometry, OpenSora
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.stdit3_config import CONFIG
from vpo_engine.models.opensora.text import ByteTokenizer, T5Encoder
from vpo_engine.models.opensora.vae import OpenSoraVAE, to_uint8
from vpo_engine.video_model import Blueprint, LoadContext, ReadConfig
from vpo_engine.video_model import TextSource as EncodedText

Part = TypeVar("Part", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"
BUILD_COMMAND = "python -m tools.sprites build"
FPS = 8.0
FLOW = RectifiedFlow(use_timestep_transform=True, transform_scale=512 / SIZE)
"""Times are shifted towards noise for larger and longer clips, as published, with 32 px in the place of 512."""
MAX_LENGTH = 32
"""The largest number of tokens: bytes of the longest caption and its end mark."""
GEOMETRY = Geometry(height=SIZE, width=SIZE, num_frames=FRAMES, fps=int(FPS))


def load_policy(folder: Path | None = None) -> STDiT3:
    """Load the shipped policy, or that of a folder, in float32.

    Its sizes are compared with those of its weights before they take memory.
    """

    def build(config: dict[str, Any]) -> STDiT3:
        with torch.device("meta"):
            return STDiT3.from_config(config, CONFIG if folder is None else str(folder / CONFIG))

    return _load(build, folder or WEIGHTS / "policy").float()


def load_vae(folder: Path | None = None) -> OpenSoraVAE:
    return _load(OpenSoraVAE.from_config, folder or WEIGHTS / "vae")


def load_text_encoder(folder: Path | None = None) -> T5Encoder:
    def build(config: dict[str, Any]) -> T5Encoder:
        return T5Encoder.from_config(config, ByteTokenizer(MAX_LENGTH))

    return _load(build, folder or WEIGHTS / "text_encoder").eval()


class Sprites(OpenSora):
    """The family of the sprites world: Open-Sora's classes at one small size, with shipped weights."""

    card = replace(OpenSora.card, name="the sprites world", files=(), resolutions=())

    @classmethod
    def check(cls, settings: ModelConfig) -> None:
        """Nothing to refuse: size and frame rate are those of the world, whatever the settings say."""

    @classmethod
    def size_settings(cls, height: int, width: int) -> dict[str, Any]:
        raise ValueError(f"clips of the sprites world have {SIZE} x {SIZE} pixels; leave the size out")

    @classmethod
    def readable_part(cls, settings: ModelConfig, prompt: str) -> str:
        """Return the bytes that the tokenizer takes; prompts are not cleaned."""
        return prompt.encode()[: MAX_LENGTH - 1].decode(errors="ignore")

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        """Load the shipped policy, or that of a folder (a run's ``checkpoints/*/policy``)."""
        text = context.text_source(load_text_encoder, "sprites", on_disk=False)
        return cls.of_policy(settings.policy, text, context.device, context.dtype)

    @classmethod
    def of_policy(
        cls, policy: Path | None, text: EncodedText, device: torch.device, dtype: torch.dtype
    ) -> Self:
        return cls(load_policy(policy), load_vae(), text, GEOMETRY, FLOW, device=device, dtype=dtype)

    @classmethod
    def blueprint(cls, settings: ModelConfig, read: ReadConfig, depth: int | None = None) -> Blueprint:
        return cls.without_weights(
            load_config(settings.policy or WEIGHTS / "policy"),
            load_config(WEIGHTS / "vae"),
            lambda: load_config(WEIGHTS / "text_encoder"),
            GEOMETRY,
            FLOW,
            dtype=getattr(torch, settings.dtype),
            depth=depth,
        )

    @classmethod
    def real_video(cls, prompt: str, generator: torch.Generator) -> Tensor:
        """See ``VideoModel``. The world's clips are drawn by code, clean ones without any damage."""
        return render(Attributes.of([prompt]), generator)[0]

    def save_full_policy(self, folder: Path) -> None:
        """See ``BaseModel``. No public code reads a policy of this size, so it gets no index for one."""
        save_pretrained_layout(self.network.state_dict(), self.network.config, folder)


def load_sprites(processes: Processes, dtype: torch.dtype, policy: Path | None = None) -> Sprites:
    """Load the sprites model without a configuration; see ``Sprites.load``."""
    text = TextSource(EmbeddingCache(None, "sprites"), load_text_encoder, processes)
    return Sprites.of_policy(policy, text, processes.device, dtype)


def to_pixels(videos: Tensor) -> Tensor:
    """Convert uint8 clips [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def round_trip(vae: OpenSoraVAE, videos: Tensor) -> Tensor:
    """Encode and decode uint8 clips [B, F, H, W, 3]; a policy's latents are decoded in the same way."""
    return to_uint8(vae.decode(vae.encode(to_pixels(videos), sample=False), videos.shape[1]))


def _load(build: Callable[[dict[str, Any]], Part], folder: Path) -> Part:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; make the sprites weights in a checkout of the project with: {BUILD_COMMAND}"
        )
    module = build(load_config(folder))
    load_strict(module, folder)
    return module
