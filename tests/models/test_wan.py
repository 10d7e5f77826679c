"""Wan against diffusers' pipeline on tiny random folders: text, latents, videos, times, precision, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from flow_case import CPU, changed, load_model, noise_for, relative, repeated, sampled
from flow_folders import NEGATIVE, PROMPTS, load, wan_folder
from safetensors.torch import load_file, save_file

from vpo_engine.config import ModelConfig
from vpo_engine.memory.rounding import hold_in_bfloat16

ODD = "  A  caf&amp;eacute; <3,\n by the  “sea” â€” at night "
"""A prompt with white space, an HTML entity escaped twice, and a dash in the wrong encoding. ftfy leaves the entity to
others, because there is a "<"."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("wan"))


def pipeline_latents(pipeline: Any, noise: torch.Tensor, steps: int, guidance: float, size: Any) -> Any:
    frames, height, width = size
    return pipeline(
        prompt=repeated(PROMPTS, len(noise)),
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
    ).frames


@pytest.mark.parametrize(
    ("seed", "scheduler", "size", "steps", "guidance"),
    [
        (1, None, (9, 64, 96), 4, 5.0),
        (2, FlowMatchEulerDiscreteScheduler(shift=3.0), (5, 32, 48), 3, 5.0),
        (3, None, (17, 48, 32), 5, 1.0),
    ],
)
def test_latents_are_the_pipelines_for_prompts_and_candidates_in_one_batch(
    tmp_path: Path, seed: int, scheduler: Any, size: tuple[int, int, int], steps: int, guidance: float
) -> None:
    folder = wan_folder(tmp_path, seed, scheduler=scheduler)
    model = load_model("wan", folder, num_frames=size[0], height=size[1], width=size[2])
    noise = noise_for(model, 2 * len(PROMPTS), seed)
    expected = pipeline_latents(load(WanPipeline, folder), noise, steps, guidance, size)
    found = sampled(model, noise, steps, guidance)
    assert relative(found, expected) <= 1e-4
    # The noise and the text both matter, so a mistake about either would be seen.
    assert relative(expected[:1], expected[1:2]) > 0.1
    assert relative(expected.roll(2, 0), expected) > 0.1


def test_wan_2_2_ti2v_5b_is_the_pipelines_too(tmp_path: Path) -> None:
    """Its pipeline gives every token the same time; its sides are divisible by 32."""
    folder = wan_folder(tmp_path, 4, wide=True)
    model, pipeline = load_model("wan", folder), load(WanPipeline, folder)
    noise = noise_for(model, 2)
    expected = pipeline_latents(pipeline, noise, 3, 5.0, (9, 64, 96))
    assert relative(sampled(model, noise, 3, 5.0), expected) <= 1e-4
    assert_same_video(model, pipeline, expected)
    with pytest.raises(
        ValueError, match=r"48 x 96 pixels must be divisible by 32 .* nearest size is 64 x 96"
    ):
        load_model("wan", folder, height=48)


def assert_same_video(model: Any, pipeline: Any, latents: torch.Tensor) -> None:
    """The pipeline decodes latents that are the end of a loop of no steps."""
    mean, deviation = (
        torch.tensor(pipeline.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        frames = pipeline.vae.decode(latents * deviation + mean, return_dict=False)[0]
    expected = torch.from_numpy(pipeline.video_processor.postprocess_video(frames, output_type="np"))
    found = model.decode(latents)
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape == (len(latents), *model.video_size, 3)
    assert (found.float() - expected * 255).abs().max() <= 1


def test_videos_are_the_pipelines(folder: Path) -> None:
    model, pipeline = load_model("wan", folder), load(WanPipeline, folder)
    noise = noise_for(model, 2)
    assert_same_video(model, pipeline, noise)
    whole = pipeline(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        num_frames=9,
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=noise,
        output_type="np",
    ).frames
    found = model.decode(sampled(model, noise, 3, 5.0))
    assert (found.float() - torch.from_numpy(whole) * 255).abs().max() <= 1


def test_the_first_frames_do_not_depend_on_later_latents(folder: Path) -> None:
    """Decoding a prefix of the latents gives a prefix of the video, exactly."""
    model = load_model("wan", folder)
    latents = noise_for(model, 1)
    assert torch.equal(model.decode(latents[:, :, :2]), model.decode(latents)[:, :5])


def test_text_is_cleaned_cut_at_its_end_and_filled_with_zeros(folder: Path, tmp_path: Path) -> None:
    model, pipeline = load_model("wan", folder, tmp_path), load(WanPipeline, folder)
    prompts = [*PROMPTS, ODD, "word " * 600]
    model.prepare(prompts)
    text = model.embed(prompts)
    expected, _ = pipeline.encode_prompt(prompts, max_sequence_length=512)
    torch.testing.assert_close(text.embeddings, expected, rtol=0, atol=1e-5)
    assert text.embeddings.shape[1] == 512
    assert bool(text.mask.all())  # zeros are attended to
    assert bool((text.embeddings[0, 11:] == 0).all())
    assert model.readable_part(None, ODD) == 'A café <3, by the "sea" — at night'
    held = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert held < 2 * expected[3].nbytes  # only valid rows lie on disk: a full prompt and some short ones


def test_the_network_is_told_whole_times_wherever_it_is_asked(folder: Path) -> None:
    """With UniPC a time is cut off, while the latents are noised by the time itself; with Euler nothing is cut."""
    model = load_model("wan", folder)
    model.prepare(PROMPTS)
    text, noise = model.embed(PROMPTS[:1]), noise_for(model, 1)
    whole, part = torch.tensor([321.0]), torch.tensor([321.9])
    ask = lambda t: model.predict(model.network, noise, t, text)  # noqa: E731
    assert torch.equal(ask(part), ask(whole))
    assert not torch.equal(ask(torch.tensor([322.0])), ask(whole))
    assert model.noising_scales(part)[1] == pytest.approx(0.3219)
    assert model.target_scales(part) == (-1.0, 1.0)


def test_training_times_are_uniform_then_shifted_as_sampling_is(folder: Path) -> None:
    model, wider = load_model("wan", folder), load_model("wan", folder, flow_shift=8.0)
    u = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(model.draw_timesteps(u), 1000 * 3 * u / (1 + 2 * u))
    torch.testing.assert_close(wider.draw_timesteps(u), 1000 * 8 * u / (1 + 7 * u))
    level = lambda model: model.solver(2).levels[1]  # noqa: E731
    base = (1 + 1 / 1000) / 2  # half way from 1 to the scheduler's last level
    assert level(model) == pytest.approx(3 * base / (1 + 2 * base))
    assert level(wider) == pytest.approx(8 * base / (1 + 7 * base))


def test_float32_modules_are_those_that_diffusers_keeps(folder: Path) -> None:
    model = load_model("wan", folder, dtype="bfloat16")
    hold_in_bfloat16(model.network, "stochastic_rounding", torch.bfloat16, model.card.float32_modules)
    expected = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    own, theirs = dict(model.network.named_parameters()), dict(expected.named_parameters())
    assert {name: weight.dtype for name, weight in own.items()} == {
        name: weight.dtype for name, weight in theirs.items()
    }
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    model.prepare(PROMPTS)
    text, noise, t = model.embed(PROMPTS), noise_for(model, 2), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        found = model.predict(model.network, noise, t, text)
        wanted = expected(noise.bfloat16(), t.long(), text.embeddings.bfloat16(), return_dict=False)[0]
    assert torch.equal(found, wanted.float())


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("model_index.json", {"boundary_ratio": 0.875}, r"two transformers .*0\.875.* Wan2\.2-TI2V-5B"),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            r"has two transformers",
        ),
        ("model_index.json", {"transformer_2": 3}, r"has two transformers"),
        ("transformer/config.json", {"image_dim": 1280}, r"image_dim is 1280: it starts from images"),
        ("scheduler/scheduler_config.json", {"solver_order": 3}, r"solver_order is 3, but must be 2"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            r"_class_name is DDIMScheduler",
        ),
    ],
)
def test_folders_that_the_engine_cannot_train_are_refused(
    folder: Path, tmp_path: Path, part: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_model("wan", changed(folder, tmp_path, part, **values))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_frames": 34}, r"num_frames=34 must be 4k \+ 1 .* set it to 33 or 37"),
        ({"height": 72, "width": 90}, r"72 x 90 pixels must be divisible by 16 .* nearest size is 64 x 96"),
    ],
)
def test_sizes_that_wan_cannot_represent_are_refused_before_a_file_is_read(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_model("wan", Path("absent"), **settings)


def test_the_published_vae_config_has_no_scale_factors(folder: Path, tmp_path: Path) -> None:
    """Older folders leave out what was added to the class later; its defaults stand for that."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "vae" / "config.json"
    config = json.loads(file.read_text())
    for key in ("scale_factor_temporal", "scale_factor_spatial", "patch_size", "is_residual"):
        del config[key]
    file.write_text(json.dumps(config))
    assert load_model("wan", copy).latent_shape == (4, 3, 8, 12)


@pytest.mark.parametrize(
    ("stored", "said"), [("zeros", "holds zeros only"), ("other", "two different token tables")]
)
def test_a_token_table_that_is_lost_is_refused(folder: Path, tmp_path: Path, stored: str, said: str) -> None:
    """Published folders store the table twice; some loaders leave the second at zero, and prompts mean nothing."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    state = load_file(file)
    table = state["shared.weight"]
    if stored == "zeros":
        table = state["shared.weight"] = torch.zeros_like(table)
    state["encoder.embed_tokens.weight"] = table.clone() if stored == "zeros" else table + 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        load_model("wan", copy).prepare(PROMPTS)


def test_parts_are_on_the_device_that_is_asked_for(folder: Path) -> None:
    model = load_model("wan", folder)
    assert model.device == CPU
    assert model.video_size == (9, 64, 96)


def test_embeddings_are_found_again_by_their_encoder_and_its_type(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    monkeypatch.setattr("flow_case.EmbeddingCache", lambda cache, name: ids.append(name))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for more in ({}, {"dtype": "bfloat16"}, {"text_encoder": other / "text_encoder"}):
        load_model("wan", folder, **more)
    assert len(ids) == len(set(ids)) == 3


def test_prompts_are_encoded_in_the_type_of_the_model(folder: Path) -> None:
    model = load_model("wan", folder, dtype="bfloat16")
    model.prepare(PROMPTS)
    assert model.embed(PROMPTS).embeddings.dtype == torch.bfloat16


def test_an_attention_that_cannot_run_here_is_refused(folder: Path) -> None:
    model = load_model("wan", folder)
    asked = ModelConfig.model_validate({"kind": "wan", "attention": "flash2"})
    with pytest.raises(ValueError, match="attention='flash2' cannot run here"):
        model.choose_backends(asked)
