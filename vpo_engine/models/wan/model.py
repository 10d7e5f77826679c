"""Wan as a ``VideoModel``."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor

from vpo_engine.config import ModelConfig
from vpo_engine.models.diffusers_facts import OPTIONS, Parts, Setup
from vpo_engine.models.diffusers_flow import FlowModel
from vpo_engine.models.diffusers_network import CROSS_ATTENTION_LAYERS, TextLayers
from vpo_engine.models.diffusers_sequence import TokenInputs
from vpo_engine.models.wan import names
from vpo_engine.models.wan.published import PUBLISHED
from vpo_engine.video_model import ModelCard, SizeRule

MAX_TOKENS = 512
"""Tokens of a prompt, to which the pipeline's call pads (its encode_prompt alone pads to 226)."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ffn.net.0.proj", "ffn.net.2")
STATISTICS = ("latents_mean", "latents_std")
"""The VAE's settings with a number for each latent channel."""


class Wan(FlowModel):
    """Wan 2.1 T2V 1.3B and 14B, and Wan 2.2 TI2V-5B as a text-to-video model.

    UMT5 reads a prompt with its mask; what lies behind its last token is zeros, which the network attends to. The two
    experts of Wan 2.2 A14B and models that start from images are refused.
    """

    card = ModelCard(
        name="Wan 2.1",
        files=("policy",),
        lora_targets=ATTENTION,
        lora_target_sets={"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP)},
        sizes=SizeRule(frame_step=4, frame_offset=1, exact=True, side=16),
        pipelines=("WanPipeline",),
        supports=OPTIONS | {"rollout.prune.frames"},
        float32_modules=("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
        native={"model.num_frames": 81, "model.fps": 16, "rollout.steps": 50, "rollout.guidance": 5.0},
    )
    facts = Parts(
        transformer="WanTransformer3DModel",
        vae="AutoencoderKLWan",
        text_encoder="UMT5EncoderModel",
        published=PUBLISHED["1.3B"][1],
        size=(480, 832),
        latent_channels="z_dim",
        needed=("scale_factor_temporal", "scale_factor_spatial"),
        text_layers=(
            TextLayers("condition_embedder", (("text_embedder", None),)),
            TextLayers("attn2", CROSS_ATTENTION_LAYERS),
        ),
        tokens=TokenInputs(("hidden_states",), ("rotary_emb",)),
        padding="zeros",
        encoder_mask=True,
    )

    @classmethod
    def published(cls, settings: ModelConfig) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
        """See ``DiffusersModel``. The model is recognised by a part of the folder's name, as the Hub has it."""
        folder = settings.policy.name if settings.policy else ""
        return next((found for part, found in PUBLISHED.items() if part in folder), PUBLISHED["1.3B"])

    @classmethod
    def text_size(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return MAX_TOKENS, transformer["text_dim"]

    @classmethod
    def native_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        return cls.facts.size if cls.strides(vae)[1] == 8 else (704, 1280)

    @classmethod
    def strides(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        return vae["scale_factor_temporal"], vae["scale_factor_spatial"]

    @classmethod
    def check_index(cls, index: Mapping[str, Any], folder: Path) -> None:
        """See ``DiffusersModel``. Two experts would have to be trained in turn, which the engine does not do."""
        second = index.get("transformer_2")
        if index.get("boundary_ratio") is not None or second not in (None, [None, None]):
            raise ValueError(
                f"model.policy={folder} has two transformers (transformer_2, boundary_ratio="
                f"{index.get('boundary_ratio')}), as Wan 2.2 A14B; the engine trains one. Give Wan2.1-T2V-1.3B, "
                "Wan2.1-T2V-14B or Wan2.2-TI2V-5B in diffusers' layout"
            )

    @classmethod
    def check_configs(cls, setup: Setup) -> None:
        super().check_configs(setup)
        for key in ("image_dim", "added_kv_proj_dim"):
            if setup.transformer[key] is not None:
                raise ValueError(
                    f"the transformer's {key} is {setup.transformer[key]}: it starts from images; give a model of text "
                    "to video"
                )
        for key in STATISTICS:
            if len(setup.vae[key] or ()) != setup.vae["z_dim"]:
                raise ValueError(
                    f"the VAE's {key} is {str(setup.vae[key])[:100]}, expected a number for each of its "
                    f"{setup.vae['z_dim']} latent channels; fetch its folder again"
                )
        frames, side = cls.strides(setup.vae)
        patch = setup.transformer["patch_size"]
        SizeRule(frames, 1, exact=True, side=side * patch[1]).check_sides(setup.height, setup.width)

    @classmethod
    def original_name(cls, name: str) -> str | None:
        return names.original_name(name)

    @classmethod
    def rewrite(cls, prompt: str) -> str:
        """Repair the encoding, resolve HTML entities twice, and make every run of white space one space."""
        text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
        return re.sub(r"\s+", " ", text).strip()

    def denormalised(self, latents: Tensor) -> Tensor:
        mean, deviation = (
            torch.tensor(self.setup.vae[name], device=latents.device)[:, None, None, None]
            for name in STATISTICS
        )
        return latents * deviation + mean
