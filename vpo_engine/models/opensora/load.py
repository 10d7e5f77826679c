"""Open-Sora 1.2 from local copies of the published checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from vpo_engine.models.opensora.checkpoint import load_config, load_strict
from vpo_engine.models.opensora.geometry import pixel_size
from vpo_engine.models.opensora.model import Geometry, OpenSora, TextSource
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.vae import OpenSoraVAE


def load_stdit3(folder: Path) -> STDiT3:
    """hpcai-tech/OpenSora-STDiT-v3 (config.json, model.safetensors), as float32. Errors name what is missing."""
    config = load_config(folder)
    with torch.device("meta"):
        network = STDiT3.from_config(config)
    load_strict(network, folder)
    return network.float()


def load_opensora(
    policy: Path,
    vae: Path,
    text: TextSource,
    *,
    resolution: str,
    aspect: str,
    num_frames: int,
    fps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> OpenSora:
    """The published policy and VAE at one video size.

    resolution and aspect (height to width) are names of the published table; text comes from elsewhere.
    """
    height, width = pixel_size(resolution, aspect)
    return OpenSora(
        load_stdit3(policy),
        OpenSoraVAE.from_pretrained(vae),
        text,
        Geometry(height, width, num_frames, fps),
        RectifiedFlow(use_timestep_transform=True),
        device=device,
        dtype=dtype,
    )
