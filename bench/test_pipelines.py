"""Measure seconds per prompt of the engine's rollout and of a diffusers pipeline that is called for each candidate.

Both sample the same folder from the same noise and text embeddings, with guidance, and give the same latents; neither
encodes text or decodes. The networks have random weights: tiny ones, and small ones of some millions of parameters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from candidates import sample_candidates, stacked
from measure import device, synchronize
from rows import quantiles
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config import RolloutConfig
from vpo_engine.distributed.processes import Processes
from vpo_engine.seeding import normal

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from tiny_pipelines import FOLDERS, NEGATIVE, SMALL, run_config, sized

CANDIDATES, STEPS, GUIDANCE, ROUNDS = 4, 4, 5.0, 3
PROMPTS = ["a red ball rolls over the grass", "two blue dogs run over the hill"]
TOLERANCE = 1e-4
WIDER = {
    "cogvideox": {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 4, "time_embed_dim": 128},
    "wan": {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "num_layers": 4,
        "ffn_dim": 1024,
        "freq_dim": 256,
    },
    "ltx": {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 4, "cross_attention_dim": 256},
}
"""Settings of the transformers that make a tiny folder a small one, of some million parameters."""


def folder_of(kind: str, size: str, where: Path) -> Path:
    """Write a pipeline's folder; in a small one only the transformer is larger than in a tiny one."""
    folder = FOLDERS[kind](where / kind)
    if size == "small":
        pipeline = pipeline_of(folder)
        torch.manual_seed(0)
        built = type(pipeline.transformer).from_config({**pipeline.transformer.config, **WIDER[kind]})
        built.save_pretrained(folder / "transformer")
    return folder


def pipeline_of(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder).to(device())
    pipeline.set_progress_bar_config(disable=True)
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
    model.prepare(PROMPTS)
    text, positions = model.embed(PROMPTS), range(len(PROMPTS))
    calls = pipeline_calls(kind, pipeline_of(folder), model)

    def engine() -> Tensor:
        networks = model.network, model.network
        return stacked(sample_candidates(model, networks, text, positions, rollout, 0, device()))

    def pipeline() -> Tensor:
        return torch.stack([call() for call in calls]).unflatten(0, (len(PROMPTS), CANDIDATES))

    taken: dict[Callable[[], Tensor], list[float]] = {engine: [], pipeline: []}

    @torch.no_grad()
    def one_round() -> None:
        made = []
        for sampler, seconds in taken.items():
            synchronize()
            start = time.perf_counter()
            made.append(sampler())
            synchronize()
            seconds.append((time.perf_counter() - start) / len(PROMPTS))
        off = (made[0] - made[1]).norm() / made[1].norm()
        assert off < TOLERANCE, f"the latents differ by {off:.2g} of their norm"

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    if not benchmark.disabled:
        mine, others = (quantiles(seconds[-ROUNDS:]) for seconds in taken.values())
        parameters = sum(parameter.numel() for parameter in model.network.parameters())
        case = {
            "world": f"{type(pipeline_of(folder)).__name__}, {size}",
            "parameters": f"{parameters / 1e6:.2f} M",
            "latents": "x".join(map(str, model.latent_shape)),
            "guidance": f"{GUIDANCE:g}",
            "steps": str(STEPS),
            "candidates": str(CANDIDATES),
        }
        ratio = others["seconds"] / mine["seconds"]
        add_row(
            "pipelines",
            case,
            {**mine, "pipeline_seconds": others["seconds"], "times_faster": ratio},
            device(),
        )


def pipeline_calls(kind: str, pipeline: Any, model: Any) -> list[Callable[[], Tensor]]:
    """Return a call of the pipeline for each candidate of each prompt; it returns latents [C, T, H, W]."""
    frames, height, width = SMALL[kind]
    calls = []
    for position, prompt in enumerate(PROMPTS):
        given = embeddings(kind, pipeline, prompt)
        for noise in normal((CANDIDATES, *model.latent_shape), 0, "rollout", position):
            start = noise[None].to(device())
            settings = {
                "latents": start.permute(0, 2, 1, 3, 4)
                if kind == "cogvideox"
                else packed(kind, model, start),
                "num_frames": frames,
                "height": height,
                "width": width,
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
                "output_type": "latent",
                "return_dict": False,
                **given,
            }
            if kind == "ltx":
                settings["frame_rate"] = model.fps
            calls.append(lambda settings=settings: unpacked(kind, model, pipeline(**settings)[0]))
    return calls


def embeddings(kind: str, pipeline: Any, prompt: str) -> dict[str, Any]:
    """Return the text embeddings of a prompt and of the negative prompt, as the pipeline's call takes them."""
    length = {"max_sequence_length": 512} if kind == "wan" else {}
    found = pipeline.encode_prompt(prompt, NEGATIVE, True, **length)
    if kind != "ltx":
        return {"prompt_embeds": found[0], "negative_prompt_embeds": found[1]}
    names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    return dict(zip(names, found, strict=True))


def packed(kind: str, model: Any, latents: Tensor) -> Tensor:
    return model.to_layout(latents) if kind == "ltx" else latents


def unpacked(kind: str, model: Any, latents: Tensor) -> Tensor:
    """Return the pipeline's latents [1, ...] as [C, T, H, W]."""
    if kind == "cogvideox":
        return latents.permute(0, 2, 1, 3, 4)[0]
    if kind == "ltx" and latents.dim() == 3:
        return model.from_layout(latents)[0]
    return latents[0]
