"""Folders of diffusers pipelines that are not what they should be: one clear error each, before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import PROMPTS, cogvideox_pipeline, load, settings

from vpo_engine.models.diffusers_folder import build_part, diffusers_class, find_parts
from vpo_engine.models.registry import kind_of_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "pipeline"
    cogvideox_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pipeline"))


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(settings(folder, *overrides))
    return str(error.value)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(file: Path, **tensors: Any) -> None:
    """Write a weights file again with other tensors; None drops one."""
    state = {**load_file(file), **{name.replace("__", "."): value for name, value in tensors.items()}}
    save_file(
        {name: value.clone() for name, value in state.items() if value is not None}, file, {"format": "pt"}
    )


def test_a_folder_that_is_no_pipeline_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    assert f"model.policy={tmp_path / 'absent'} is no folder" in refused(tmp_path / "absent")
    message = refused(tmp_path)
    assert "holds neither model_index.json (the folder of a pipeline) nor config.json" in message
    assert f"did you mean {folder}?" in message
    (folder / "transformer" / "config.json").unlink()
    assert f"{folder / 'transformer'} has no config.json; expected the folder of a transformer" in refused(
        folder
    )


def test_a_pipeline_of_another_family_names_its_kind(folder: Path) -> None:
    change(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    message = refused(folder)
    assert (
        "is a StableDiffusionPipeline, not a model of model.kind=cogvideox; give a folder of CogVideoXPipeline"
        in (message)
    )
    with pytest.raises(ValueError, match="names StableDiffusionPipeline, a pipeline of no known kind"):
        kind_of_folder(folder)
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        kind_of_folder(folder / "vae")
    change(folder / "model_index.json", _class_name="CogVideoXPipeline")
    change(folder / "transformer" / "config.json", _class_name="WanTransformer3DModel")
    assert "is of a WanTransformer3DModel, expected a CogVideoXTransformer3DModel" in refused(folder)


def test_a_missing_shard_and_missing_weights_are_named(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    state = load_file(file)
    file.unlink()
    assert f"{folder / 'transformer'} has neither {WEIGHTS} nor {WEIGHTS}.index.json" in refused(folder)
    names = sorted(state)
    shards = {f"part-{number}.safetensors": names[number::2] for number in range(2)}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / "transformer" / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    loaded = load(settings(folder))
    assert all(torch.equal(loaded.network.state_dict()[name], state[name]) for name in names)
    (folder / "transformer" / "part-1.safetensors").unlink()
    assert "no weight file part-1.safetensors" in refused(folder)


def test_missing_weights_of_the_text_encoder_are_named_before_the_transformer_is_read(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert f"{folder / 'text_encoder'} has neither model.safetensors nor pytorch_model.bin" in refused(folder)


@pytest.mark.parametrize(
    ("part", "tensor", "value", "text"),
    [
        ("transformer", "proj_out__bias", None, "missing proj_out.bias"),
        ("transformer", "more", torch.zeros(2), "unexpected more"),
        ("transformer", "proj_out__bias", torch.zeros(3), "proj_out.bias is [3], expected [16]"),
        (
            "vae",
            "decoder__conv_in__conv__bias",
            torch.zeros(1),
            "decoder.conv_in.conv.bias is [1], expected [4]",
        ),
    ],
)
def test_an_altered_tensor_is_named(folder: Path, part: str, tensor: str, value: Any, text: str) -> None:
    rewrite(folder / part / WEIGHTS, **{tensor: value})
    message = refused(folder)
    assert f"{folder / part} is not a checkpoint of a" in message
    assert text in message


def test_a_file_that_was_cut_off_is_named(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read" in refused(folder)


def test_parts_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    cogvideox_pipeline(text_embed_dim=48).save_pretrained(tmp_path / "other")
    assert "the text encoder gives 32 text channels and the transformer takes 48" in refused(
        tmp_path / "other"
    )
    change(folder / "text_encoder" / "config.json", model_type="umt5")
    assert "the text encoder is a umt5, and the model was trained with a t5" in refused(folder)
    change(folder / "text_encoder" / "config.json", model_type="t5")
    change(folder / "vae" / "config.json", latent_channels=8)
    assert "the VAE gives 8 latent channels and the transformer takes 4" in refused(folder)


def test_a_schedule_without_noise_is_refused(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    change(file, beta_start=1e-30, beta_end=1e-30, rescale_betas_zero_snr=False)
    message = refused(folder)
    assert f"{file} does not describe a scheduler that can run" in message
    assert "where noise falls from 1 to 0" in message


def test_a_text_encoder_of_zeros_is_refused(folder: Path) -> None:
    """Whichever of the two names the file stores the token table under, and whatever the other holds."""
    file = folder / "text_encoder" / "model.safetensors"
    table = load_file(file)["shared.weight"]
    rewrite(file, shared__weight=torch.zeros_like(table))
    assert "the token table shared.weight holds zeros only" in refused(folder)
    rewrite(file, shared__weight=table, encoder__embed_tokens__weight=torch.zeros_like(table))
    assert "holds two different token tables" in refused(folder)
    rewrite(file, shared__weight=None, encoder__embed_tokens__weight=table)
    text = load(settings(folder)).embed(PROMPTS).embeddings
    assert not torch.equal(text[0], text[1])


def test_a_missing_tokenizer_and_a_missing_schedule_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    assert "there is no scheduler_config.json that says the noise schedule" in refused(folder)
    shutil.rmtree(folder / "tokenizer")
    assert f"there is no tokenizer for {folder / 'text_encoder'}" in refused(folder)


def test_a_transformer_alone_needs_the_other_parts(folder: Path) -> None:
    message = refused(folder / "transformer")
    assert (
        "is the folder of a transformer alone, so model.vae and model.text_encoder must be given too"
        in message
    )
    whole = [f"model.vae={folder}", f"model.text_encoder={folder / 'text_encoder'}"]
    assert load(settings(folder / "transformer", *whole)).latent_shape == (4, 3, 8, 12)


def test_a_model_with_rotary_embeddings_is_refused(tmp_path: Path) -> None:
    cogvideox_pipeline(use_rotary_positional_embeddings=True).save_pretrained(tmp_path / "pipeline")
    assert "the transformer has rotary position embeddings, as CogVideoX-5B and 1.5 do" in refused(
        tmp_path / "pipeline"
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.num_frames=34"], "model.num_frames=34 must be 8k + 1 or 8k + 8 for this model; set it to 33 or 40"),
        (["model.num_frames=2"], "set it to 1 or 8"),
        (["model.height=240", "model.width=426"], "240 x 426 pixels must be divisible by 16"),
        (["model.height=250"], "250 x 720 pixels must be divisible by 16 for this model; the nearest"),
        (["model.resolution=480p"], "model.resolution=480p has no effect on model.kind=cogvideox (CogVideoX-2B)"),
        (["model.aesthetic_score=5.0"], "model.aesthetic_score=5.0 has no effect"),
    ],
)  # fmt: skip
def test_settings_that_the_model_cannot_take_are_refused_without_a_file(
    tmp_path: Path, overrides: list[str], text: str
) -> None:
    assert text in refused(tmp_path / "absent", *overrides)


def test_buffers_that_no_checkpoint_holds_are_computed(original: Path) -> None:
    """Position tables and the frequencies of rope are as the class computes them; what is stored waits on meta."""
    for name in ("CogVideoXTransformer3DModel", "WanTransformer3DModel"):
        sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
        torch.manual_seed(0)
        plain, built = diffusers_class(name)(**sizes), build_part(name, sizes)
        stored = plain.state_dict().keys()
        assert all(tensor.is_meta for tensor in built.state_dict().values())
        computed = {key: buffer for key, buffer in plain.named_buffers() if key not in stored}
        assert computed
        for key, buffer in computed.items():
            assert torch.equal(dict(built.named_buffers())[key], buffer), key


def test_parts_of_another_pipeline_stand_beside_the_policys_own_schedule(
    folder: Path, tmp_path: Path
) -> None:
    """The tokenizer is the text encoder's. A transformer alone has the schedule of the VAE's pipeline."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    schedule, pipelines = Path("scheduler/scheduler_config.json"), ("CogVideoXPipeline",)
    found = find_parts(folder, other, other / "text_encoder", pipelines, "cogvideox")
    assert found.scheduler == folder / schedule
    assert (found.transformer, found.vae) == (folder / "transformer", other / "vae")
    assert (found.text_encoder, found.tokenizer) == (other / "text_encoder", other / "tokenizer")
    alone = find_parts(folder / "transformer", other, folder, pipelines, "cogvideox")
    assert alone.scheduler == other / schedule


def test_a_folder_in_bfloat16_is_trained_in_float32(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    rounded = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(rounded, file, {"format": "pt"})
    held = load(settings(folder)).network.state_dict()
    assert {weight.dtype for weight in held.values()} == {torch.float32}
    assert all(torch.equal(held[name], weight.float()) for name, weight in rounded.items())
