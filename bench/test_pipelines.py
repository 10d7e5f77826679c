"""Measure seconds per prompt of the engine's rollout and of a diffusers pipeline that is called for each candidate.

Both sample the same folder from the same noise, with guidance, and give the same latents. Both encode every text once,
and neither decodes. The networks have random weights: tiny ones, and small ones of some millions of parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from candidates import sample_candidates, stacked
from measure import device
from side_by_side import compare
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.diffusers_model import DiffusersModel
from vpo_engine.seeding import normal

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from tiny_pipelines import FOLDERS, NEGATIVE, run_config, sized

CANDIDATES, STEPS, GUIDANCE = 4, 4, 5.0
PROMPTS = ["a red ball rolls over the grass", "two blue dogs run over the hill"]
TOLERANCE = 1e-4
HEADS, HEAD_DIM, LAYERS = 4, 64, 4
"""Of the transformer that makes a tiny folder a small one, of some million parameters."""


def folder_of(kind: str, size: str, where: Path) -> Path:
    """Write a pipeline's folder; in a small one only the transformer is larger than in a tiny one."""
    folder = FOLDERS[kind](where / kind)
    if size == "small":
        pipeline = pipeline_of(folder)
        torch.manual_seed(0)
        built = type(pipeline.transformer).from_config(widened(dict(pipeline.transformer.config)))
        built.save_pretrained(folder / "transformer")
    return folder


def widened(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a transformer with more and wider layers."""
    width = HEADS * HEAD_DIM
    changes = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": LAYERS}
    changes |= {"ffn_dim": 4 * width, "cross_attention_dim": width}
    return config | {name: value for name, value in changes.items() if name in config}


def pipeline_of(folder: Path) -> Any:
    """Return the pipeline, which encodes every prompt once."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder).to(device())
    pipeline.set_progress_bar_config(disable=True)
    encode, known = pipeline.encode_prompt, {}

    def encode_once(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        if key not in known:
            known[key] = encode(*args, **kwargs)
        return known[key]

    pipeline.encode_prompt = encode_once
    return pipeline


@pytest.mark.benchmark(group="rollout per prompt, against diffusers")
@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_rollout_against_the_pipeline(kind: str, size: str, tmp_path: Path, benchmark, add_row) -> None:
    folder = folder_of(kind, size, tmp_path)
    config = run_config(
        kind,
        folder,
        tmp_path / "run",
        *sized(kind),
        f"model.device={device()}",
        f"model.negative_prompt={NEGATIVE}",
    )
    model = build_model(config, Processes.start(str(device())), say=lambda line: None)
    rollout = RolloutConfig(candidates=CANDIDATES, steps=STEPS, guidance=GUIDANCE)
    assert isinstance(model, DiffusersModel)
    model.prepare(PROMPTS)
    text, positions = model.embed(PROMPTS), range(len(PROMPTS))
    calls = pipeline_calls(pipeline_of(folder), model)

    def engine() -> Tensor:
        networks = model.network, model.network
        return stacked(sample_candidates(model, networks, text, positions, rollout, 0, device()))

    def pipeline() -> Tensor:
        return torch.stack([call() for call in calls]).unflatten(0, (len(PROMPTS), CANDIDATES))

    numbers = compare(engine, pipeline, len(PROMPTS), TOLERANCE, benchmark, "pipeline")
    if not benchmark.disabled:
        parameters = sum(parameter.numel() for parameter in model.network.parameters())
        case = {
            "world": f"{type(pipeline_of(folder)).__name__}, {size}",
            "parameters": f"{parameters / 1e6:.2f} M",
            "latents": "x".join(map(str, model.latent_shape)),
            "guidance": f"{GUIDANCE:g}",
            "steps": str(STEPS),
            "candidates": str(CANDIDATES),
        }
        add_row("pipelines", case, numbers, device())


def pipeline_calls(pipeline: Any, model: DiffusersModel) -> list[Callable[[], Tensor]]:
    """Return a call of the pipeline for each candidate of each prompt; it returns latents [C, T, H, W]."""
    calls = []
    for position, prompt in enumerate(PROMPTS):
        for noise in normal((CANDIDATES, *model.latent_shape), 0, "rollout", position):
            settings = {
                "prompt": prompt,
                "negative_prompt": NEGATIVE,
                "num_frames": model.setup.num_frames,
                "height": model.setup.height,
                "width": model.setup.width,
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
            }
            calls.append(partial(latents_of, pipeline, model, noise[None].to(device()), settings))
    return calls


def latents_of(pipeline: Any, model: DiffusersModel, noise: Tensor, settings: dict[str, Any]) -> Tensor:
    given = model.pipeline_arguments() | {"output_type": "latent", "return_dict": False}
    return model.from_layout(pipeline(**settings, **given, latents=model.to_layout(noise))[0])[0]
