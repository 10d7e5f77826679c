"""Open-Sora 1.2 as a ``VideoModel``: STDiT3, the VAE, rectified flow and text, at one size of video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vpo_engine.memory.residency import Residency, module_tensors
from vpo_engine.models.lora import has_adapter, save_adapter
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.compiled import CompiledBlocks
from vpo_engine.models.opensora.graphs import StepGraph
from vpo_engine.models.opensora.rectified_flow import (
    RectifiedFlow,
    caption_states,
    guided_velocity,
    velocity_of,
)
from vpo_engine.models.opensora.reuse import Reuse
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.protocols import Denoised, Network, SamplerSettings, TextEmbedding


class TextSource(Protocol):
    """Text embeddings of prompts, encoded beforehand."""

    def prepare(self, prompts: Sequence[str]) -> None: ...

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding: ...


@dataclass(frozen=True)
class Geometry:
    """Size of the videos: pixels, frames, frames a second."""

    height: int
    width: int
    num_frames: int
    fps: int


class OpenSora:
    """The policy network with everything around it; see ``vpo_engine.protocols.VideoModel``.

    ``dtype`` is that of the arithmetic and of the VAE. With bfloat16, networks of float32 weights run under autocast,
    others as they are, and t is rounded to bfloat16 as the published bfloat16 model does, for policy and reference
    alike (opensora/models/stdit/stdit3.py casts t to the model's dtype). ``decode_frames`` bounds the frames that the
    image decoder takes at once, ``decode_rows`` the rows of its maps (None: as published).
    """

    def __init__(
        self,
        network: STDiT3,
        vae: OpenSoraVAE,
        text: TextSource,
        geometry: Geometry,
        flow: RectifiedFlow,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = network.to(device).eval()
        self.vae = vae.to(device, dtype).eval().requires_grad_(False)
        self._text = text
        self._geometry = geometry
        self._flow = flow
        self.device, self.dtype = device, dtype
        self.decode_frames: int | None = None
        self.decode_rows: int | None = None
        self._compiled: CompiledBlocks | None = None
        self.residency = Residency.everything()
        self.num_frames, self.fps = geometry.num_frames, geometry.fps
        size = self.vae.latent_size(geometry.num_frames, geometry.height, geometry.width)
        self.latent_shape = (network.config["in_channels"], *size)

    def stay_by(self, residency: Residency) -> None:
        """Let ``residency`` say when the policy and the VAE are on the device."""
        self.residency = residency
        residency.register("policy", lambda: module_tensors(self.network))
        residency.register("vae", lambda: module_tensors(self.vae))

    def prepare(self, prompts: Sequence[str]) -> None:
        self._text.prepare(prompts)

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        text = self._text(prompts)
        longest = int(text.mask.sum(dim=1).max())
        text = TextEmbedding(text.embeddings[:, :longest], text.mask[:, :longest])
        return text.to(self.device)

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        """The velocity x0 - noise, float32 [B, C, T, H, W]; the network's other output channels are dropped."""
        with self._autocast():
            velocity = guided_velocity(
                network,
                latents,
                self._rounded(t),
                text.embeddings,
                text.mask,
                self.network.y_embedder.y_embedding,
                guidance,
                **self._size(),
            )
        return velocity.float()

    def draw_timesteps(self, u: Tensor) -> Tensor:
        size = self._geometry
        return self._flow.draw_timesteps(u, size.height, size.width, size.num_frames)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._flow.add_noise(latents, noise, t)

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._flow.noising_scales(t)

    def target_scales(self, t: Tensor) -> tuple[float, float]:
        return self._flow.TARGET_SCALES

    @torch.no_grad()
    def sample(
        self, network: Network, noise: Tensor, text: TextEmbedding, *, steps: int, guidance: float
    ) -> Tensor:
        return self.denoise(network, noise, text, SamplerSettings(steps, guidance)).latents

    @torch.no_grad()
    def denoise(
        self,
        network: Network,
        latents: Tensor,
        text: TextEmbedding,
        settings: SamplerSettings,
        part: slice = slice(None),
    ) -> Denoised:
        """See the protocol. Text is projected for all blocks once, in the first step of either number of branches."""
        branches: dict[float, Callable[[Tensor, Tensor], Tensor]] = {}

        def predict(z: Tensor, time: float) -> Tensor:
            scale = settings.guidance if settings.guided_at(time / self._flow.num_timesteps) else 1.0
            if scale not in branches:
                branches[scale] = self._branch(network, text, settings, scale)
            return branches[scale](z, self._rounded(torch.full((len(z),), time, device=z.device)))

        times, lengths = self.schedule(settings.steps)
        return Denoised(*self._flow.integrate(predict, latents, times[part], lengths[part]))

    def _branch(
        self, network: Network, text: TextEmbedding, settings: SamplerSettings, scale: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The predictions (z, t [B]) of one loop at one guidance scale."""
        if settings.compile == "blocks":
            self._compiled = self._compiled or CompiledBlocks(self.device)
        captions = caption_states(text.embeddings, self.network.y_embedder.y_embedding, scale)
        reuse = Reuse(settings.cache, self._compiled if settings.compile == "blocks" else None)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            with self._autocast():
                velocity = velocity_of(network, z, t, captions, text.mask, scale, reuse=reuse, **self._size())
            return velocity.float()

        return StepGraph(predict, network) if settings.compile == "graphs" else predict

    def schedule(self, steps: int) -> tuple[list[float], list[float]]:
        """Times of the sampling steps, in the schedule's units, and their lengths."""
        size = self._geometry
        times, lengths = self._flow.sampling_timesteps(steps, size.height, size.width, size.num_frames)
        return times.tolist(), lengths.tolist()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with self.residency.phase("decode"):
            return self.vae.decode_uint8(latents, self.num_frames, self.decode_frames, self.decode_rows)

    def save_policy(self, folder: Path) -> None:
        """The published layout; of a policy with an adapter the adapter alone, in PEFT's."""
        if has_adapter(self.network):
            save_adapter(self.network, folder)
        else:
            save_pretrained_layout(self.network.state_dict(), self.network.config, folder)

    def _rounded(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).float()

    def _size(self) -> dict[str, Any]:
        size = self._geometry
        return {"fps": float(size.fps), "height": size.height, "width": size.width}

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != self.network.dtype)
