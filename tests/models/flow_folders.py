"""Folders of tiny Wan and LTX-Video pipelines with random weights, written by diffusers' ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

PROMPTS = ["a red cat", "two blue dogs run over the hill"]
NEGATIVE = "dull"
TEXT = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
LTX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""The published scheduler_config.json of LTX-Video, where it differs from the defaults."""


def wan_folder(
    folder: Path, seed: int = 0, *, scheduler: Any = None, wide: bool = False, **index: Any
) -> Path:
    """Write a tiny Wan 2.1, or with ``wide`` a tiny Wan 2.2 TI2V-5B, whose VAE reduces sides by 16."""
    random = torch.Generator().manual_seed(seed)
    channels = 6 if wide else 4
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT["d_model"],
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
        rope_max_seq_len=64,
    )
    sizes: dict[str, Any] = {"dim_mult": [1, 1, 1, 1]}
    if wide:
        sizes |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        sizes |= {"scale_factor_spatial": 16, "decoder_base_dim": 4}
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        num_res_blocks=1,
        latents_mean=torch.randn(channels, generator=random).tolist(),
        latents_std=(torch.rand(channels, generator=random) + 0.5).tolist(),
        **sizes,
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT)),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler
        or UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if wide else 3.0
        ),
        expand_timesteps=wide,
        **index,
    )
    return _saved(pipeline, folder, random)


def ltx_folder(
    folder: Path, seed: int = 0, *, scheduler: Any = None, timestep_conditioning: bool = False
) -> Path:
    """Write a tiny LTX-Video; with ``timestep_conditioning`` its VAE is as that of 0.9.1 and later."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    channels = 8
    vae = AutoencoderKLLTXVideo(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )
    vae.latents_mean.normal_(generator=random)
    vae.latents_std.uniform_(0.5, 1.5, generator=random)
    pipeline = LTXPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**TEXT, feed_forward_proj="gated-gelu")),
        vae=vae,
        transformer=LTXVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=TEXT["d_model"],
        ),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**LTX_SCHEDULER),
    )
    return _saved(pipeline, folder, random)


def tokenizer() -> T5Tokenizer:
    """Return a tokenizer of letters, with pad 0, end 1 and unknown 2, as the published ones have them."""
    letters = ["<pad>", "</s>", "<unk>", *map(chr, range(ord("a"), ord("z") + 1)), "▁"]
    return T5Tokenizer(vocab=[(letter, -float(number)) for number, letter in enumerate(letters)], extra_ids=0)


def load(pipeline: type[DiffusionPipeline], folder: Path, **settings: Any) -> Any:
    loaded = pipeline.from_pretrained(folder, **settings)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@torch.no_grad()
def _saved(pipeline: Any, folder: Path, random: torch.Generator) -> Path:
    """Save a pipeline after its vectors, which start as zeros and ones, were moved: every weight then matters. Text
    matters more than in other random networks, so that tests see a mistake about it."""
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        _move_vectors(part, random)
    for name, parameter in pipeline.transformer.named_parameters():
        if "attn2" in name or "text_embedder" in name:
            parameter.mul_(3)
    pipeline.save_pretrained(folder)
    return folder


def _move_vectors(part: nn.Module, random: torch.Generator) -> None:
    for parameter in part.parameters():
        if parameter.dim() == 1 or not bool(parameter.any()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
