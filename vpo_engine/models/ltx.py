"""LTX-Video 2B (0.9 to 0.9.5) as a ``VideoModel``. docs/new_model.md says how this file came to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vpo_engine.config import ModelConfig
from vpo_engine.model_values import TextEmbedding
from vpo_engine.models.diffusers_facts import OPTIONS, Parts, Setup
from vpo_engine.models.diffusers_flow import FlowModel
from vpo_engine.models.diffusers_network import CROSS_ATTENTION_LAYERS, TextLayers
from vpo_engine.models.diffusers_sequence import TokenInputs
from vpo_engine.video_model import ModelCard, SizeRule

DECODE_TIME, DECODE_NOISE = 0.05, 0.025
"""The time that a timestep-conditioned VAE is told, and the share of noise in the latents that it decodes. Source: the
published example of LTX-Video 0.9.1."""
DECODE_SEED = 0
"""The seed of that noise. It is the same for all videos, so that a video's score depends on its latents alone."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {},
    "vae": {},
    "text_encoder": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
}
"""The published config files, where they differ from the defaults of the classes."""


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ff.net.0.proj", "ff.net.2")


class LTXVideo(FlowModel):
    """LTX-Video: packed latents, masked text of 128 tokens, noise levels shifted by the size of the video."""

    card = ModelCard(
        name="LTX-Video",
        files=("policy",),
        lora_targets=ATTENTION,
        lora_target_sets={"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP)},
        sizes=SizeRule(frame_step=8, frame_offset=1, exact=True, side=32),
        pipelines=("LTXPipeline",),
        supports=OPTIONS - {"model.attention", "rollout.compile=graphs"},
        native={"model.num_frames": 161, "model.fps": 25, "rollout.steps": 50, "rollout.guidance": 3.0},
    )
    facts = Parts(
        transformer="LTXVideoTransformer3DModel",
        vae="AutoencoderKLLTXVideo",
        text_encoder="T5EncoderModel",
        published=PUBLISHED,
        size=(512, 704),
        text_layers=(TextLayers("attn2", CROSS_ATTENTION_LAYERS),),
        tokens=TokenInputs(("hidden_states",), ("image_rotary_emb",)),
        padding="masked",
    )
    levels_from_one = True

    @classmethod
    def text_size(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return 128, transformer["caption_channels"]

    @classmethod
    def strides(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        frames, side = vae["patch_size_t"] * halvings, vae["patch_size"] * halvings
        return vae["temporal_compression_ratio"] or frames, vae["spatial_compression_ratio"] or side

    @classmethod
    def check_configs(cls, setup: Setup) -> None:
        """See ``DiffusersModel``. Models of other patches and strides are not published, and not tried."""
        super().check_configs(setup)
        patches = setup.transformer["patch_size_t"], setup.transformer["patch_size"]
        if (patches, cls.strides(setup.vae)) != ((1, 1), (8, 32)):
            raise ValueError(
                f"patches of {patches} latents and a VAE of strides {cls.strides(setup.vae)} are not LTX-Video's; give "
                "the folder of LTX-Video 0.9 to 0.9.5"
            )

    @classmethod
    def original_name(cls, name: str) -> str | None:
        return name.replace("time_embed.", "adaln_single.") if name != "proj_in" else "patchify_proj"

    def to_layout(self, latents: Tensor) -> Tensor:
        """Return the network's tokens [B, T * H * W, C] of latents [B, C, T, H, W]."""
        return latents.flatten(2).transpose(1, 2)

    def from_layout(self, prediction: Tensor) -> Tensor:
        return prediction.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def arguments(self, text: TextEmbedding) -> dict[str, Any]:
        _, frames, height, width = self.latent_shape
        frame_stride, side = self.strides(self.setup.vae)
        return {
            "encoder_hidden_states": text.embeddings,
            "encoder_attention_mask": text.mask.to(text.embeddings.device),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (frame_stride / self.fps, side, side),
        }

    def choose_backends(self, settings: ModelConfig) -> str:
        """See ``DiffusersModel``. Other implementations of attention than torch's own take no mask."""
        return str(self.network.choose_backends("sdpa", dtype=self.dtype))

    def pipeline_arguments(self) -> dict[str, Any]:
        noise = {"generator": torch.Generator().manual_seed(DECODE_SEED), "decode_noise_scale": DECODE_NOISE}
        return {"frame_rate": self.fps, "decode_timestep": DECODE_TIME, **noise}

    def denormalised(self, latents: Tensor) -> Tensor:
        mean, deviation = (
            statistic.view(-1, 1, 1, 1).to(latents)
            for statistic in (self.vae.latents_mean, self.vae.latents_std)
        )
        return latents * deviation / self.setup.vae["scaling_factor"] + mean

    def pixels(self, latents: Tensor) -> Tensor:
        """See ``DiffusersModel``. A timestep-conditioned VAE decodes latents with a little noise, always the same."""
        time = None
        if self.setup.vae["timestep_conditioning"]:
            random = torch.Generator().manual_seed(DECODE_SEED)
            noise = torch.randn(1, *self.latent_shape, generator=random).to(latents)
            latents = (1 - DECODE_NOISE) * latents + DECODE_NOISE * noise
            time = torch.full((len(latents),), DECODE_TIME, device=latents.device, dtype=latents.dtype)
        frames: Tensor = self.vae.decode(latents, time, return_dict=False)[0]
        return frames
