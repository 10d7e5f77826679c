"""CogVideoX of the engine against CogVideoXPipeline of diffusers, on folders that save_pretrained wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import PROMPTS, TOKENS, cogvideox_pipeline, load, settings, tiny_t5
from torch import Tensor

from vpo_engine.models.diffusers_text import FolderEncoder
from vpo_engine.models.registry import kind_of_folder
from vpo_engine.protocols import SamplerSettings, TextEmbedding


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return cogvideox_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cogvideox") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> Any:
    return load(settings(folder))


def of_pipeline(pipeline: Any, noise: Tensor, prompt: str, **settings: Any) -> Any:
    """Return the pipeline's latents of one noise [1, C, T, H, W]."""
    frames = 4 * noise.shape[2] - 3 if noise.shape[2] % 2 else 4 * noise.shape[2]
    with torch.no_grad():
        return pipeline(
            prompt=prompt,
            height=8 * noise.shape[3],
            width=8 * noise.shape[4],
            num_frames=frames,
            latents=noise.transpose(1, 2).contiguous(),
            max_sequence_length=TOKENS,
            **settings,
        ).frames


def drawn(model: Any, count: int) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(7))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_folder_names_the_kind(folder: Path) -> None:
    assert kind_of_folder(folder) == "cogvideox"


@pytest.mark.parametrize(
    ("size", "guidance", "negative"),
    [
        ((None, None, 9), 6.0, None),
        ((None, None, 9), 1.0, None),
        ((48, 80, 16), 3.0, "blurry"),
        ((32, 32, 1), 6.0, ""),
    ],
)
def test_latents_are_those_of_the_pipeline(
    pipeline: Any,
    folder: Path,
    size: tuple[int | None, int | None, int],
    guidance: float,
    negative: str | None,
) -> None:
    """All prompts and candidates in one batch, against the pipeline called for each by itself."""
    height, width, frames = size
    changes = [f"model.{name}={value}" for name, value in (("height", height), ("width", width)) if value]
    given = [] if negative is None else [f"model.negative_prompt='{negative}'"]
    model = load(settings(folder, *changes, *given, frames=frames))
    assert model.video_size == (frames, height or 64, width or 96)
    noise, text = drawn(model, 4), model.embed(PROMPTS)
    found = model.sample(model.network, noise, text, steps=6, guidance=guidance)
    for row in range(4):
        expected = of_pipeline(
            pipeline,
            noise[row : row + 1],
            PROMPTS[row // 2],
            negative_prompt=negative,
            guidance_scale=guidance,
            num_inference_steps=6,
            output_type="latent",
        ).transpose(1, 2)
        assert relative(found[row : row + 1], expected) < 1e-4


def test_frames_are_those_of_the_pipeline(pipeline: Any, model: Any) -> None:
    noise, text = drawn(model, 2), model.embed(PROMPTS)
    videos = model.decode(model.sample(model.network, noise, text, steps=4, guidance=6.0))
    assert videos.shape == (2, 9, 64, 96, 3)
    for row, prompt in enumerate(PROMPTS):
        made = of_pipeline(
            pipeline,
            noise[row : row + 1],
            prompt,
            guidance_scale=6.0,
            num_inference_steps=4,
            output_type="np",
        )
        assert (videos[row].float() - torch.tensor(made[0]) * 255).abs().max() <= 1.0


def test_one_rule_of_time_and_text_serves_rollout_policy_and_reference(model: Any) -> None:
    """The prediction of a step of a loop, whose text was computed before, is that of ``predict``."""
    noise, text = drawn(model, 4), model.embed(PROMPTS)
    step = model.predictor(model.network, text, SamplerSettings(4, 6.0), 6.0)
    with torch.no_grad():
        for time in (999.0, 37.0):
            t = torch.full((4,), time)
            expected = model.predict(model.network, noise, t, text, 6.0)
            assert relative(step(noise, t), expected) < 1e-5


def test_a_loop_computes_the_text_once_for_each_prompt(model: Any) -> None:
    calls: list[int] = []
    layer = model.network.patch_embed.text_proj
    layer.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    noise, text = drawn(model, 6), model.embed(PROMPTS)
    model.sample(model.network, noise, text, steps=5, guidance=6.0)
    assert calls == [4], "one call, for two prompts and as many negative ones"
    model.predict(model.network, noise[:2], torch.ones(2), text)
    assert calls[1:] == [2]


def test_the_negative_prompt_is_the_first_half_of_a_pass(model: Any) -> None:
    seen: list[Tensor] = []

    def network(*args: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        seen.append(encoder_hidden_states)
        assert args[0].shape == (4, 3, 4, 8, 12), "the latents come first, as the engine counts rows by them"
        return model.network(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)

    text = model.embed(PROMPTS)
    with torch.no_grad():
        model.predict(network, drawn(model, 2), torch.ones(2), text, 6.0)
    (given,) = seen
    assert torch.equal(given[2:], text.embeddings)
    assert torch.equal(given[:2], model.embed([""]).embeddings.expand(2, -1, -1))


def test_all_tokens_of_the_padding_count(model: Any, pipeline: Any) -> None:
    text = model.embed(PROMPTS)
    assert text.mask.all()
    assert text.mask.shape == (2, TOKENS)
    expected = torch.cat([pipeline.encode_prompt(one, max_sequence_length=TOKENS)[0] for one in PROMPTS])
    assert torch.allclose(text.embeddings, expected, atol=1e-6)


def test_a_prompt_that_is_cut_is_noted_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two prompts are longer than the tiny model's 12 tokens only if they have more than 11 bytes."""
    load(settings(folder), ["short"])
    assert "note:" not in capsys.readouterr().err
    load(settings(folder), ["a" * 12, "b" * 40, "short"])
    noted = capsys.readouterr().err
    assert noted.count("note: of ") == 1
    assert f"the model reads {TOKENS} of 41 tokens" in noted


@pytest.mark.parametrize("cut", [1, 3])
def test_a_loop_that_is_cut_and_resumed_is_the_same(model: Any, cut: int) -> None:
    noise, text = drawn(model, 2), model.embed(PROMPTS)
    choice = SamplerSettings(4, 6.0)
    whole = model.denoise(model.network, model.start(noise), text, choice)
    half = model.denoise(model.network, model.start(noise), text, choice, cut)
    assert torch.equal(model.denoise(model.network, half, text, choice).latents, whole.latents)
    assert relative(whole.preview, whole.latents) < 1e-6


def test_a_saved_policy_is_a_transformer_of_diffusers(model: Any, folder: Path, tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    with torch.no_grad():
        model.network.proj_out.bias.add_(1.0)
    model.save_policy(tmp_path / "policy")
    names = sorted(path.name for path in (tmp_path / "policy").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    saved = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "policy")
    kept = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    assert {name: value for name, value in saved.config.items() if name != "_name_or_path"} == {
        name: value for name, value in kept.config.items() if name != "_name_or_path"
    }
    for name, value in model.network.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name
    other = load(settings(tmp_path / "policy", f"model.vae={folder / 'vae'}", f"model.text_encoder={folder}"))
    assert torch.equal(other.network.proj_out.bias, model.network.proj_out.bias)
    with torch.no_grad():
        model.network.proj_out.bias.add_(1.0)
    model.load_policy(tmp_path / "policy")
    assert torch.equal(other.network.proj_out.bias, model.network.proj_out.bias)


def test_every_time_has_a_finite_error_and_margin_zero_holds_at_the_last(model: Any) -> None:
    text: TextEmbedding = model.embed(PROMPTS)
    t = torch.tensor([999.0, 0.0])
    latents, noise = drawn(model, 2), torch.randn(2, *model.latent_shape)
    kept, added = model.noising_scales(t)
    assert float(kept[0]) == 0.0
    assert float(added[0]) == 1.0
    noised = model.add_noise(latents, noise, t)
    assert torch.equal(noised[0], noise[0])
    assert model.predict(model.network, noised, t, text).isfinite().all()
    clean, of_noise = model.target_scales(t)
    assert (float(clean[0]), float(of_noise[0])) == (-1.0, 0.0)


class Tokens:
    """A tokenizer by which every prompt is four times the same token."""

    name_or_path = "a folder"

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, prompts: list[str], **_: Any) -> dict[str, Tensor]:
        ids = torch.full((len(prompts), 4), self.token)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_ends_of_what_the_text_encoder_reads(capsys: pytest.CaptureFixture[str]) -> None:
    """Its last token, and a prompt of as many tokens as the model reads."""
    encoder = tiny_t5(0)
    known = encoder.get_input_embeddings().num_embeddings
    read = FolderEncoder(encoder, Tokens(known - 1), 4, masked=False, attended=True).encode(["a"])
    assert read.embeddings.shape[:2] == (1, 4)
    assert "note:" not in capsys.readouterr().err
    beyond = FolderEncoder(encoder, Tokens(known), 4, masked=False, attended=True)
    with pytest.raises(
        ValueError, match=f"a folder gives the token {known}, and the text encoder has {known}"
    ):
        beyond.encode(["a"])


def test_a_policy_trained_at_another_size_is_saved_with_the_models_own(folder: Path, tmp_path: Path) -> None:
    model = load(settings(folder, "model.height=32", "model.width=64", frames=17))
    assert model.video_size == (17, 32, 64)
    model.save_policy(tmp_path / "policy")
    names = ("sample_height", "sample_width", "sample_frames")
    for place in (folder / "transformer", tmp_path / "policy"):
        config = json.loads((place / "config.json").read_text())
        assert [config[name] for name in names] == [8, 12, 9], place
