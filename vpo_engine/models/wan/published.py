"""The sizes of the published models: what stands in the config files of their folders, where it differs from the
defaults of diffusers' and transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
_VAE = {"base_dim": 96, "z_dim": 16}
_VAE_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""The statistics of the 48 latent channels stand in the VAE's own folder; the planner needs none."""


def _sizes(
    transformer: Mapping[str, Any], vae: Mapping[str, Any] = _VAE, **scheduler: Any
) -> dict[str, dict[str, Any]]:
    return {
        "transformer": {"in_channels": 16, "out_channels": 16, "text_dim": 4096, **transformer},
        "vae": dict(vae),
        "text_encoder": dict(_UMT5_XXL),
        "scheduler": {**_UNIPC, **scheduler},
    }


PUBLISHED = {
    "1.3B": (
        "Wan2.1-T2V-1.3B",
        _sizes({"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}),
    ),
    "14B": (
        "Wan2.1-T2V-14B",
        _sizes({"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}),
    ),
    "5B": (
        "Wan2.2-TI2V-5B",
        _sizes(
            {
                "num_layers": 30,
                "num_attention_heads": 24,
                "ffn_dim": 14336,
                "in_channels": 48,
                "out_channels": 48,
            },
            _VAE_2_2,
            flow_shift=5.0,
        ),
    ),
}
"""Names and sizes, by a part of the name of the published folder."""
