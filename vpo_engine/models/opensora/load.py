"""The policy of Open-Sora 1.2 from a local copy of its published checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from vpo_engine.models.opensora.checkpoint import load_config, load_strict
from vpo_engine.models.opensora.stdit3 import STDiT3


def load_stdit3(folder: Path) -> STDiT3:
    """Load hpcai-tech/OpenSora-STDiT-v3 (config.json, model.safetensors) as float32. Errors name what is missing."""
    config = load_config(folder)
    with torch.device("meta"):
        network = STDiT3.from_config(config)
    load_strict(network, folder)
    return network.float()
