"""Open-Sora 1.2 from local copies of the published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vpo_engine.models.opensora.checkpoint import load_strict
from vpo_engine.models.opensora.stdit3 import STDiT3


def load_stdit3(folder: Path) -> STDiT3:
    """hpcai-tech/OpenSora-STDiT-v3 (config.json, model.safetensors), float32. Errors name what is missing."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{config} is missing; {folder} should be a copy of hpcai-tech/OpenSora-STDiT-v3, which holds "
            "config.json and model.safetensors"
        )
    with torch.device("meta"):
        network = STDiT3.from_config(json.loads(config.read_text(encoding="utf-8")))
    load_strict(network, folder)
    return network.float()
