"""The contents of the published config.json files, for planning where the files themselves are not here."""

from __future__ import annotations

from typing import Any

STDIT3_XL2: dict[str, Any] = {"freeze_y_embedder": True}
"""hpcai-tech/OpenSora-STDiT-v3, where it differs from the class's defaults."""

VAE_V1_2: dict[str, Any] = {
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.10, 0.34, 0.27, 0.98],
    "vae_2d": {"from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"},
    "vae_temporal": {"type": "VAE_Temporal_SD"},
}
"""hpcai-tech/OpenSora-VAE-v1.2."""

T5_V1_1_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
"""DeepFloyd/t5-v1_1-xxl."""
