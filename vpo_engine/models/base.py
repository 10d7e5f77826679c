"""The base class of model families: sampling loop, text, offload, saving. A family overrides what differs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpo_engine.config import MemoryConfig, ModelConfig
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.idle_offload import IdleOffload, PartName, module_tensors
from vpo_engine.model_values import Network, RowFlops, SamplerSettings, SamplerState, TextEmbedding
from vpo_engine.models.lora import has_adapter, load_adapter, save_adapter
from vpo_engine.models.step_graph import Predict, StepGraph
from vpo_engine.video_model import Blueprint, ReadConfig, TextSource, VideoModel
from vpo_engine.weights import read_files


class BaseModel(VideoModel):
    """A ``VideoModel`` with defaults.

    A family still has to define ``card``, ``load``, ``null_text``, ``predict``, ``draw_timesteps``,
    ``noising_scales``, ``target_scales``, ``solver``, ``to_video`` and ``save_full_policy``, and its constructor has to
    set ``latent_shape``, ``fps`` and ``text_rule``.
    """

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module | None,
        text: TextSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Move network and VAE to the device, the VAE in ``dtype`` too; None where there is no VAE to be moved."""
        self.device, self.dtype = device, dtype
        self.network = network.to(device).eval()
        self.idle_offload = IdleOffload.disabled()
        self._text = text
        self._parts: dict[PartName, nn.Module] = {"policy": self.network}
        if vae is not None:
            self._parts["vae"] = vae.to(device, dtype).eval().requires_grad_(False)

    # --- for a family to define, or to override ------------------------------------------------------------

    @abstractmethod
    def to_video(self, latents: Tensor) -> Tensor:
        """Turn latents [B, C, T, H, W] into videos, uint8 [B, F, height, width, 3]."""

    def to_latents(self, pixels: Tensor) -> Tensor:
        """Turn pixels [B, 3, F, height, width] from -1 to 1 into latents [B, C, T, H, W], the mean of the posterior."""
        raise ValueError(f"{self.card.name} does not encode videos; give their latents")

    def to_pixels(self, latents: Tensor, frames: Sequence[int] | None) -> Tensor:
        """Turn latents [B, C, T, H, W] into pixels [B, f, 3, height, width] from -1 to 1, with gradients.

        frames: as in ``VideoModel.decode_pixels``. The activations of the decoder should be checkpointed.
        """
        raise NotImplementedError(f"{type(self).__name__} supports method=reward_gradient without to_pixels")

    @abstractmethod
    def save_full_policy(self, folder: Path) -> None:
        """Write a fully trained policy in the layout that its own project loads."""

    def predictor(
        self, network: Network, text: TextEmbedding, settings: SamplerSettings, guidance: float
    ) -> Predict:
        """Return the predictions (latents, t) of one sampling loop at one guidance scale.

        A family overrides this to compute once in a loop what does not change from step to step, and to support
        ``rollout.cache`` and ``rollout.compile=blocks``.
        """
        return lambda latents, t: self.predict(network, latents, t, text, guidance)

    @classmethod
    def check(cls, settings: ModelConfig) -> None:
        missing = [name for name in cls.card.files if getattr(settings, name) is None]
        if missing:
            raise ValueError(
                f"kind {settings.kind} needs local checkpoints, but these are not set: {', '.join(missing)}; "
                "give them as model.NAME=/path/to/folder"
            )
        cls.card.sizes.check_frames(settings.num_frames)

    @classmethod
    def blueprint(cls, settings: ModelConfig, read: ReadConfig, depth: int | None = None) -> Blueprint | None:
        return None

    @property
    def decoders(self) -> Sequence[nn.Module]:
        return []

    def use_memory(self, memory: MemoryConfig) -> None:
        """Take over no setting: a family that supports settings of memory overrides this."""

    def choose_backends(self, settings: ModelConfig) -> str:
        return ""

    def row_flops(self, text: TextEmbedding) -> RowFlops | None:
        return None

    # --- text ----------------------------------------------------------------------------------------------

    def prepare(self, prompts: Sequence[str]) -> None:
        with self.idle_offload.phase("text"):
            self._text.prepare(prompts)

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        text = self._text(prompts)
        if self.text_rule.padding == "masked":
            longest = int(text.mask.sum(dim=1).max())
            text = TextEmbedding(text.embeddings[:, :longest], text.mask[:, :longest])
        elif self.text_rule.padding == "zeros":
            kept = text.embeddings * text.mask[..., None].to(text.embeddings)
            kept = F.pad(kept, (0, 0, 0, self.text_rule.max_tokens - kept.shape[1]))
            text = TextEmbedding(kept, torch.ones(kept.shape[:2], dtype=torch.bool))
        return text.to(self.device)

    # --- sampling ------------------------------------------------------------------------------------------

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        kept, added = (scale.view(-1, *[1] * (latents.dim() - 1)) for scale in self.noising_scales(t))
        return kept * latents + added * noise

    def start(self, noise: Tensor) -> SamplerState:
        latents = noise if noise.dtype == torch.float64 else noise.float()
        return SamplerState(latents, latents)

    def start_from(self, latents: Tensor, noise: Tensor, steps: int, step: int) -> SamplerState:
        level = torch.full((len(latents),), self._time_before(steps, step), device=latents.device)
        noised = self.add_noise(latents, noise, level)
        return SamplerState(noised, noised, step)

    def _time_before(self, steps: int, step: int) -> float:
        """Return the time of the schedule at which latents are as noisy as before a step of ``steps``."""
        return self.solver(steps).times[step]

    @torch.no_grad()
    def denoise(
        self,
        network: Network,
        state: SamplerState,
        text: TextEmbedding,
        settings: SamplerSettings,
        stop: int | None = None,
    ) -> SamplerState:
        """See ``VideoModel``. There is one ``predictor`` for each guidance scale that the loop meets."""
        solver = self.solver(settings.steps)
        stop = settings.steps if stop is None else stop
        assert state.step <= stop <= settings.steps, f"{state.step} steps are done, and {stop} are asked for"
        predictors: dict[float, Predict] = {}
        latents, preview, memory = state.latents, state.preview, state.memory
        for step in range(state.step, stop):
            scale = settings.guidance if settings.guided_at(solver.noise_level(step)) else 1.0
            if scale not in predictors:
                predictors[scale] = self._predictor(network, text, settings, scale)
            t = torch.full((len(latents),), solver.times[step], device=latents.device)
            prediction = predictors[scale](latents, t)
            before = latents
            latents, memory = solver.advance(step, before, prediction, memory)
            if step + 1 == stop:
                preview = solver.preview(step, before, latents, prediction)
            del before
        return SamplerState(latents, preview, stop, memory)

    def _predictor(
        self, network: Network, text: TextEmbedding, settings: SamplerSettings, guidance: float
    ) -> Predict:
        predict = self.predictor(network, text, settings, guidance)
        return StepGraph(predict, network) if settings.compile == "graphs" else predict

    def sample(
        self, network: Network, noise: Tensor, text: TextEmbedding, *, steps: int, guidance: float
    ) -> Tensor:
        settings = SamplerSettings(steps, guidance)
        return self.denoise(network, self.start(noise), text, settings).latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with self.idle_offload.phase("decode"):
            return self.to_video(latents)

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """See ``VideoModel``. A family that supports it defines ``to_latents``. Videos are encoded one by one."""
        with self.idle_offload.phase("decode"):
            parts = [
                self.to_latents(video.to(self.device).movedim(4, 1).float() / 127.5 - 1)
                for video in videos.split(1)
            ]
        return torch.cat(parts).float()

    def decode_pixels(self, latents: Tensor, frames: Sequence[int] | None = None) -> Tensor:
        """See ``VideoModel``. A family that supports it defines ``to_pixels``."""
        if "method=reward_gradient" not in self.card.supports:
            return super().decode_pixels(latents, frames)
        pixels = self.to_pixels(latents, frames)
        if not bool(torch.isfinite(pixels).all()):
            bad = int((~torch.isfinite(pixels)).sum())
            raise NotFiniteError(f"the decoder makes {bad} of {pixels.numel()} pixels that are not finite")
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    # --- memory and files ----------------------------------------------------------------------------------

    @property
    def parts(self) -> Mapping[PartName, nn.Module]:
        return self._parts

    def stay_by(self, idle_offload: IdleOffload) -> None:
        self.idle_offload = idle_offload
        for name in self.parts:
            idle_offload.register(name, partial(self._tensors, name))

    def _tensors(self, name: PartName) -> list[Tensor]:
        return module_tensors(self.parts[name])

    def save_policy(self, folder: Path) -> None:
        if has_adapter(self.network):
            save_adapter(self.network, folder)
        else:
            self.save_full_policy(folder)

    def load_policy(self, folder: Path) -> None:
        """See ``VideoModel``. A full policy is read from model.safetensors, with the network's own key names."""
        if has_adapter(self.network):
            load_adapter(self.network, folder)
        else:
            self.network.load_state_dict(read_files([folder / "model.safetensors"]), strict=True)
