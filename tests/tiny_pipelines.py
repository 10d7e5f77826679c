"""Folders of tiny pipelines with random weights, written by diffusers' ``save_pretrained``, and runs of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel

from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.directory import RunDirectory

sys.path.insert(0, str(Path(__file__).parent / "models"))

from flow_folders import TEXT, ltx_folder, tokenizer, wan_folder

PROMPT, NEGATIVE = "a red cat", "dull"
RUN = ("rollout.steps=3", "rollout.guidance=3")
LORA = ("model.lora.rank=4", "model.lora.alpha=6", "reference.storage=adapter")


def cogvideox_folder(folder: Path, seed: int = 0) -> Path:
    """Write a tiny CogVideoX-2B, made for videos of 32 x 48 pixels."""
    torch.manual_seed(seed)
    channels = 4
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**TEXT, feed_forward_proj="gated-gelu")),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=channels,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=1.15258426,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=channels,
            time_embed_dim=8,
            text_embed_dim=TEXT["d_model"],
            num_layers=2,
            sample_height=4,
            sample_width=6,
            sample_frames=9,
        ),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
        ),
    )
    return saved(pipeline, folder, seed)


@torch.no_grad()
def saved(pipeline: Any, folder: Path, seed: int = 0) -> Path:
    """Save a pipeline after its vectors, which start as zeros and ones, were moved: every weight then matters."""
    random = torch.Generator().manual_seed(seed)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        move_vectors(part, random)
    pipeline.save_pretrained(folder)
    return folder


def move_vectors(part: nn.Module, random: torch.Generator) -> None:
    for parameter in part.parameters():
        if parameter.dim() == 1 or not bool(parameter.any()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "cogvideox": cogvideox_folder,
    "wan": wan_folder,
    "ltx": ltx_folder,
}
SMALL = {"cogvideox": (9, 32, 48), "wan": (5, 32, 48), "ltx": (9, 64, 96)}
"""A small size of each kind: frames, height, width."""


def sized(kind: str) -> list[str]:
    """Return the settings of the small size."""
    frames, height, width = SMALL[kind]
    return [f"model.num_frames={frames}", f"model.height={height}", f"model.width={width}", "model.fps=8"]


def run_config(kind: str, policy: Path | None, root: Path, *overrides: str) -> Config:
    """Return the configuration of a run; nothing but the model matters in it."""
    files = [f"run_dir={root}", f"model.kind={kind}", "reward.kind=builtin"]
    if kind != "sprites":
        files += [f"model.policy={policy}", "prompts.train=none.txt", "prompts.held_out=none.txt"]
    return load_config(None, [*RUN, *files, *overrides])


def trained(config: Config, *steps: int) -> Path:
    """Make the directory of a run whose policy, or adapter, has values that differ from those it started from.

    There is a checkpoint for each of ``steps`` (2 unless given), each with another policy.
    """
    assert config.run_dir is not None
    run = RunDirectory.create_at(config.run_dir, dump_config(config))
    model = build_model(config, Processes.start("cpu"), say=lambda line: None)
    for step in steps or (2,):
        disturb(model.network, step)
        save_checkpoint(
            run.checkpoints, step, tensors={}, state={}, write_policy=model.save_policy, keep=len(steps) or 1
        )
    return run.root


@torch.no_grad()
def disturb(network: nn.Module, seed: int) -> None:
    """Change every weight that a run would train."""
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random).to(parameter))
