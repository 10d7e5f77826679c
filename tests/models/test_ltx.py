"""LTX-Video against diffusers' pipeline on tiny random folders: text, latents, videos, times, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline
from flow_case import changed, load_model, noise_for, relative, repeated, sampled
from flow_folders import LTX_SCHEDULER, NEGATIVE, PROMPTS, load, ltx_folder
from torch import Tensor

from vpo_engine.models.ltx import DECODE_NOISE, DECODE_SEED, DECODE_TIME


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ltx_folder(tmp_path_factory.mktemp("ltx"))


def made_by(pipeline: Any, model: Any, noise: Tensor, steps: int, guidance: float, **more: Any) -> Any:
    """Return what the pipeline makes of the engine's noise; it takes packed latents."""
    frames, height, width = model.video_size
    return pipeline(
        prompt=repeated(PROMPTS, len(noise)),
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        frame_rate=model.fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise.flatten(2).transpose(1, 2),
        **more,
    ).frames


@pytest.mark.parametrize(
    ("seed", "scheduler", "size", "fps", "steps", "guidance"),
    [
        (1, None, (9, 64, 96), 25, 4, 3.0),
        (2, None, (17, 96, 64), 16, 3, 1.0),
        (3, FlowMatchEulerDiscreteScheduler(shift=2.0), (9, 32, 64), 24, 5, 3.0),
    ],
)
def test_latents_are_the_pipelines_for_prompts_and_candidates_in_one_batch(
    tmp_path: Path,
    seed: int,
    scheduler: Any,
    size: tuple[int, int, int],
    fps: int,
    steps: int,
    guidance: float,
) -> None:
    folder = ltx_folder(tmp_path, seed, scheduler=scheduler)
    model = load_model("ltx", folder, num_frames=size[0], height=size[1], width=size[2], fps=fps)
    noise = noise_for(model, 2 * len(PROMPTS), seed)
    packed = made_by(load(LTXPipeline, folder), model, noise, steps, guidance, output_type="latent")
    found = sampled(model, noise, steps, guidance)
    assert relative(found.flatten(2).transpose(1, 2), packed) <= 1e-4
    assert relative(packed.roll(2, 0), packed) > 0.1


@pytest.mark.parametrize("conditioned", [False, True])
def test_videos_are_the_pipelines(tmp_path: Path, conditioned: bool) -> None:
    """A VAE that is told a time decodes noisy latents: the noise is the same for every video, in every batch."""
    folder = ltx_folder(tmp_path, 5, timestep_conditioning=conditioned)
    model, pipeline = load_model("ltx", folder), load(LTXPipeline, folder)
    noise = noise_for(model, 2)
    found = model.decode(sampled(model, noise, 3, 3.0))
    for number, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt=prompt,
            negative_prompt=NEGATIVE,
            num_frames=9,
            height=64,
            width=96,
            frame_rate=model.fps,
            num_inference_steps=3,
            guidance_scale=3.0,
            latents=noise[number : number + 1].flatten(2).transpose(1, 2),
            decode_timestep=DECODE_TIME,
            decode_noise_scale=DECODE_NOISE,
            generator=torch.Generator().manual_seed(DECODE_SEED),
            output_type="np",
        ).frames
        assert found.shape[1:] == expected.shape[1:]
        assert (found[number].float() - torch.from_numpy(expected[0]) * 255).abs().max() <= 1


def test_text_is_encoded_with_its_padding_and_masked_for_the_network(folder: Path) -> None:
    """The encoder attends to 128 tokens, the network to those of the prompt, so a batch is cut to its longest."""
    model, pipeline = load_model("ltx", folder), load(LTXPipeline, folder)
    model.prepare(PROMPTS)
    text = model.embed(PROMPTS)
    expected, mask, _, _ = pipeline.encode_prompt(PROMPTS)
    longest = int(mask.sum(1).max())
    assert longest < 128
    assert torch.equal(text.mask, mask[:, :longest])
    kept = text.mask[..., None]
    torch.testing.assert_close(text.embeddings * kept, expected[:, :longest] * kept, rtol=0, atol=1e-5)


def test_a_negative_prompt_may_be_longer_than_the_prompts(folder: Path) -> None:
    long = "worst quality " * 5
    model = load_model("ltx", folder, negative_prompt=long)
    noise = noise_for(model, 2)
    pipeline = load(LTXPipeline, folder)
    packed = pipeline(
        prompt=PROMPTS,
        negative_prompt=long,
        num_frames=9,
        height=64,
        width=96,
        frame_rate=model.fps,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=noise.flatten(2).transpose(1, 2),
        output_type="latent",
    ).frames
    assert relative(sampled(model, noise, 3, 3.0).flatten(2).transpose(1, 2), packed) <= 1e-4


def test_the_shift_follows_the_size_of_the_video_and_may_be_given(folder: Path) -> None:
    u = torch.tensor([0.25, 0.75])
    for frames, tokens in ((9, 12), (161, 126)):
        model = load_model("ltx", folder, num_frames=frames)
        mu = LTX_SCHEDULER["base_shift"] + (tokens - 1024) * (2.05 - 0.95) / 3072
        shift = math.exp(mu)
        torch.testing.assert_close(model.draw_timesteps(u), 1000 * shift * u / (1 + (shift - 1) * u))
    given = load_model("ltx", folder, flow_shift=4.0)
    torch.testing.assert_close(given.draw_timesteps(u), 1000 * 4 * u / (1 + 3 * u))
    assert given.solver(4).levels[-2] == pytest.approx(0.1)  # shift_terminal still ends the schedule
    assert np.isclose(given.network_time(torch.tensor([321.9])), 321.9)  # nothing is rounded


def test_strides_follow_from_the_vaes_config(folder: Path) -> None:
    model = load_model("ltx", folder, num_frames=17)
    assert model.latent_shape == (8, 3, 2, 3)
    assert model.video_size == (17, 64, 96)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_frames": 34}, r"num_frames=34 must be 8k \+ 1 .* set it to 33 or 41"),
        ({"height": 72, "width": 96}, r"72 x 96 pixels must be divisible by 32 .* nearest size is 64 x 96"),
    ],
)
def test_sizes_that_ltx_cannot_represent_are_refused_before_a_file_is_read(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_model("ltx", Path("absent"), **settings)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("transformer", {"patch_size": 2}, r"patches of \(1, 2\) latents .* are not LTX-Video's"),
        ("vae", {"spatial_compression_ratio": 16}, r"a VAE of strides \(8, 16\)"),
    ],
)
def test_folders_of_other_shapes_are_refused(
    folder: Path, tmp_path: Path, part: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_model("ltx", changed(folder, tmp_path, f"{part}/config.json", **values))
