"""Open-Sora 1.2 as a ``VideoModel``: STDiT3, the VAE, rectified flow and text, at one size of video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vpo_engine.config import MemoryConfig, ModelConfig
from vpo_engine.distributed.sequence import SequenceGroup
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.base import BaseModel
from vpo_engine.models.diffusers_text import text_model, text_settings
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout, write_public_index
from vpo_engine.models.opensora.compiled import CompiledBlocks
from vpo_engine.models.opensora.geometry import CHUNK_FRAMES, named_size, pixel_size
from vpo_engine.models.opensora.load import load_stdit3
from vpo_engine.models.opensora.published import STDIT3_XL2, T5_V1_1_XXL, VAE_V1_2
from vpo_engine.models.opensora.rectified_flow import (
    RectifiedFlow,
    caption_states,
    guided_velocity,
    null_captions,
    velocity_of,
)
from vpo_engine.models.opensora.reuse import Reuse
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.stdit3_config import CONFIG, STDiT3Config
from vpo_engine.models.opensora.text import MAX_LENGTH, T5Encoder, prepare_prompt, without_scores
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.models.opensora.vae_gradient import decode_with_gradients
from vpo_engine.models.solvers import EulerFlow
from vpo_engine.models.step_graph import Predict
from vpo_engine.protocols import Network, SamplerSettings, TextEmbedding
from vpo_engine.video_model import (
    Blueprint,
    LoadContext,
    ModelCard,
    ReadConfig,
    SizeRule,
    TextRule,
    TextSource,
)

_ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
_MLP = ("mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Geometry:
    """Size of the videos: pixels, frames, frames a second."""

    height: int
    width: int
    num_frames: int
    fps: int


class OpenSora(BaseModel):
    """The policy network with everything around it.

    ``dtype`` is that of the arithmetic and of the VAE. With bfloat16, networks of float32 weights run under autocast,
    others as they are, and t is rounded to bfloat16 as the published bfloat16 model does, for policy and reference
    alike (opensora/models/stdit/stdit3.py casts t to the model's dtype). ``decode_frames`` bounds the frames that the
    image decoder takes at once, ``decode_strip_height`` the rows of its maps (None: as published).
    """

    card = ModelCard(
        name="Open-Sora 1.2",
        run_policy=(
            "python scripts/inference.py configs/opensora-v1-2/inference/sample.py --ckpt-path policy"
        ),
        files=("policy", "vae", "text_encoder"),
        lora_targets=_ATTENTION,
        lora_target_sets={"attention": _ATTENTION, "mlp": _MLP, "all": (*_ATTENTION, *_MLP)},
        sizes=SizeRule(frame_step=CHUNK_FRAMES),
        resolutions=("240p", "360p", "480p", "720p"),
        supports=frozenset(
            {
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
                "method=reward_gradient",
                "distributed.sequence_parallel",
                "processes.split_guidance",
            }
        ),
    )
    network: STDiT3

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
        super().__init__(network, vae, text, device=device, dtype=dtype)
        self.vae = vae
        self._geometry = geometry
        self._flow = flow
        self.decode_frames: int | None = None
        self.decode_strip_height: int | None = None
        self._compiled: CompiledBlocks | None = None
        self.num_frames, self.fps = geometry.num_frames, geometry.fps
        size = self.vae.latent_size(geometry.num_frames, geometry.height, geometry.width)
        side = self.vae.spatial_factor
        self.video_size = (geometry.num_frames, side * size[1], side * size[2])
        config = network.config
        self.latent_shape = (config["in_channels"], *size)
        self.text_rule = TextRule(min(MAX_LENGTH, config["model_max_length"]), config["caption_channels"])

    # --- before anything is loaded -------------------------------------------------------------------------

    @classmethod
    def check(cls, settings: ModelConfig) -> None:
        """See ``VideoModel``; resolution and aspect must stand in the published table."""
        super().check(settings)
        pixel_size(settings.resolution, settings.aspect)
        if 1 < settings.num_frames < CHUNK_FRAMES:
            raise ValueError(
                f"model.num_frames={settings.num_frames}: times are shifted by whole chunks of {CHUNK_FRAMES} frames; "
                f"set it to 1, or to {CHUNK_FRAMES} or more"
            )

    @classmethod
    def readable_part(cls, settings: ModelConfig, prompt: str) -> str:
        return without_scores(prepare_prompt(prompt, aes=settings.aesthetic_score))

    @classmethod
    def load(cls, settings: ModelConfig, context: LoadContext) -> Self:
        """Load the published policy and VAE; the text encoder is loaded when prompts are prepared."""
        folder = settings.text_encoder
        # The settings have been checked.
        assert settings.policy is not None
        assert settings.vae is not None
        assert folder is not None

        network = load_stdit3(settings.policy, context.base)
        tokens = min(MAX_LENGTH, network.config["model_max_length"])

        def load_encoder() -> T5Encoder:
            return T5Encoder.from_pretrained(
                folder, max_length=tokens, dtype=context.dtype, device=context.device
            )

        text = context.text_source(
            load_encoder,
            f"{folder}, {tokens} tokens, {settings.dtype}",
            lambda prompt: prepare_prompt(prompt, aes=settings.aesthetic_score),
        )
        return cls(
            network,
            OpenSoraVAE.from_pretrained(settings.vae),
            text,
            _geometry(settings),
            RectifiedFlow(use_timestep_transform=True),
            device=context.device,
            dtype=context.dtype,
        )

    @classmethod
    def blueprint(cls, settings: ModelConfig, read: ReadConfig, depth: int | None = None) -> Blueprint:
        return cls.without_weights(
            read(settings.policy, STDIT3_XL2, "STDiT3-XL/2"),
            read(settings.vae, VAE_V1_2, "OpenSora-VAE-v1.2"),
            lambda: read(settings.text_encoder, T5_V1_1_XXL, "T5 v1.1 XXL"),
            _geometry(settings),
            RectifiedFlow(use_timestep_transform=True),
            dtype=getattr(torch, settings.dtype),
            depth=depth,
        )

    @classmethod
    def without_weights(
        cls,
        network_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        text_config: Callable[[], Mapping[str, Any]],
        geometry: Geometry,
        flow: RectifiedFlow,
        *,
        dtype: torch.dtype,
        depth: int | None,
    ) -> Blueprint:
        """Build the parts from the contents of their config.json, on the meta device."""
        meta, configured = torch.device("meta"), STDiT3Config.from_dict(network_config).depth
        with meta:
            network = STDiT3.from_config({**network_config, "depth": depth or configured})
            vae = OpenSoraVAE.from_config(vae_config)

        def text_encoder() -> nn.Module:
            with meta:
                encoder = text_model("T5EncoderModel", text_settings("T5EncoderModel", CONFIG, text_config()))
            return encoder.eval().requires_grad_(False)

        model = cls(network, vae, _NoText(), geometry, flow, device=meta, dtype=dtype)
        return Blueprint(model, configured, text_encoder)

    @classmethod
    def size_settings(cls, height: int, width: int) -> dict[str, Any]:
        """See ``VideoModel``; sizes have names in the published table."""
        resolution, aspect = named_size(height, width)
        return {"resolution": resolution, "aspect": aspect}

    # --- the interface -------------------------------------------------------------------------------------

    def null_text(self, text: TextEmbedding) -> TextEmbedding:
        """See ``VideoModel``. A null caption keeps its prompt's mask, as in the published sampler."""
        null = null_captions(text.embeddings, self.network.y_embedder.y_embedding)
        return TextEmbedding(null, text.mask)

    def predict(
        self, network: Network, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        """Return the velocity x0 - noise; the network's other output channels are dropped."""
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

    def predictor(
        self, network: Network, text: TextEmbedding, settings: SamplerSettings, guidance: float
    ) -> Predict:
        """See ``BaseModel``. Text is projected for all blocks once, in the first step."""
        run = None
        if settings.compile == "blocks":
            run = self._compiled = self._compiled or CompiledBlocks(self.device)
        split = settings.split
        captions = caption_states(text.embeddings, self.network.y_embedder.y_embedding, guidance, split)
        reuse = Reuse(settings.cache, run, self.network.sequence)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            with self._autocast():
                velocity = velocity_of(
                    network,
                    z,
                    self._rounded(t),
                    captions,
                    text.mask,
                    guidance,
                    split,
                    reuse=reuse,
                    **self._size(),
                )
            return velocity.float()

        return predict

    def draw_timesteps(self, u: Tensor) -> Tensor:
        size = self._geometry
        return self._flow.draw_timesteps(u, size.height, size.width, size.num_frames)

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._flow.noising_scales(t)

    def target_scales(self, t: Tensor) -> tuple[float, float]:
        return self._flow.TARGET_SCALES

    def solver(self, steps: int) -> EulerFlow:
        size = self._geometry
        return self._flow.solver(steps, size.height, size.width, size.num_frames)

    def to_video(self, latents: Tensor) -> Tensor:
        return self.vae.decode_uint8(latents, self.num_frames, self.decode_frames, self.decode_strip_height)

    def to_latents(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels, sample=False)

    def to_pixels(self, latents: Tensor, frames: Sequence[int] | None) -> Tensor:
        return decode_with_gradients(self.vae, latents, self.num_frames, frames, self.decode_frames)

    @property
    def decoders(self) -> Sequence[nn.Module]:
        """Return the modules that decode a micro-batch of frames, whole or in strips, and a chunk of latents."""
        images = self.vae.spatial_vae
        return [images.module.decoder, images.strips, self.vae.temporal_vae.decoder]

    def use_memory(self, memory: MemoryConfig) -> None:
        self.network.activations = Activations(
            memory.activation_checkpointing, memory.offload_activations, memory.mlp_chunks
        )
        self.decode_frames, self.decode_strip_height = memory.decode_frames, memory.decode_strip_height

    def share_sequence(self, group: SequenceGroup) -> None:
        _, frames, rows, columns = self.latent_shape
        _, patch_rows, patch_columns = self.network.settings.patch_size
        group.check(
            latent_frames=frames, patches_of_a_frame=-(-rows // patch_rows) * -(-columns // patch_columns)
        )
        self.network.sequence = group

    def choose_backends(self, settings: ModelConfig) -> str:
        return str(self.network.choose_backends(settings.attention, settings.fused_ops, dtype=self.dtype))

    def save_full_policy(self, folder: Path) -> None:
        """See ``BaseModel``. transformers reads the folder, and so does the public code's --ckpt-path."""
        save_pretrained_layout(self.network.state_dict(), self.network.config, folder)
        write_public_index(folder)

    def _rounded(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).float()

    def _size(self) -> dict[str, Any]:
        size = self._geometry
        return {"fps": float(size.fps), "height": size.height, "width": size.width}

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != self.network.dtype)


class _NoText:
    """The text of a model without weights: embeddings are given to it directly."""

    def prepare(self, prompts: Sequence[str]) -> None:
        raise AssertionError

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        raise AssertionError


def _geometry(settings: ModelConfig) -> Geometry:
    size = pixel_size(settings.resolution, settings.aspect)
    return Geometry(*size, settings.num_frames, settings.fps)
