"""The configurations of Wan and LTX-Video: the sizes of the published models, and what their runs take."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpo_engine.config import ModelConfig
from vpo_engine.config_file import load_config
from vpo_engine.models.registry import check_model, model_family
from vpo_engine.planning.gpus import GIB, GPUS
from vpo_engine.planning.parts import Assumed
from vpo_engine.planning.planner import plan_run

NATIVE = {
    "wan": {"num_frames": 81},
    "ltx": {"num_frames": 161},
}


@pytest.mark.parametrize(
    ("kind", "folder", "network", "vae", "latents"),
    [
        ("wan", "Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800, 126_892_531, (16, 21, 60, 104)),
        ("wan", "Wan2.1-T2V-14B-Diffusers", 14_288_491_584, 126_892_531, (16, 21, 60, 104)),
        ("wan", "Wan2.2-TI2V-5B-Diffusers", 4_999_787_712, 704_688_668, (48, 21, 44, 80)),
        ("ltx", "LTX-Video", 1_923_385_472, 419_193_649, (128, 21, 16, 22)),
    ],
)
def test_published_sizes_stand_in_for_folders_that_are_not_here(
    kind: str, folder: str, network: int, vae: int, latents: tuple[int, ...]
) -> None:
    """Counts of parameters are those of the published weights."""
    settings = ModelConfig.model_validate(
        {"kind": kind, "policy": Path("checkpoints") / folder, **NATIVE[kind]}
    )
    assumed = Assumed()
    found = model_family(kind).blueprint(settings, assumed.config, None)
    assert found is not None
    assert found.model.latent_shape == latents
    assert sum(weight.numel() for weight in found.model.network.parameters()) == network
    assert sum(weight.numel() for weight in found.model.parts["vae"].parameters()) == vae
    assert all(weight.is_meta for weight in found.model.network.parameters())
    if kind == "wan":
        assert folder.removesuffix("-Diffusers") in assumed.notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "wan2_1_1_3b.yaml",
        "wan2_1_1_3b_240p.yaml",
        "wan2_1_14b_lora.yaml",
        "wan2_1_14b_lora_24gib.yaml",
        "ltx_video_2b.yaml",
    ],
)
def test_shipped_configurations_ask_for_nothing_that_their_family_lacks(name: str) -> None:
    check_model(load_config(name))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "gpu", "limit_gib"),
    [
        ("wan2_1_1_3b.yaml", "a100-40g", 39.4),
        ("wan2_1_14b_lora.yaml", "h100-80g", 79.1),
        ("wan2_1_14b_lora_24gib.yaml", "rtx4090", 23.6),
        ("ltx_video_2b.yaml", "a100-40g", 39.4),
    ],
)
def test_shipped_configurations_fit_the_device_that_they_are_for(
    name: str, gpu: str, limit_gib: float
) -> None:
    plan = plan_run(load_config(name), GPUS[gpu])
    assert plan.peak.total <= limit_gib * GIB
