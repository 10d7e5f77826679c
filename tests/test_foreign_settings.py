"""Settings of published models are refused, or taken, by what the classes that read them say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import transformers

from vpo_engine.foreign_settings import _parameters, check_settings, completed
from vpo_engine.models.opensora.stdit3_config import STDiT3Config
from vpo_engine.models.opensora.vae import OpenSoraVAE

WAN, WAN_VAE = diffusers.WanTransformer3DModel, diffusers.AutoencoderKLWan
COG, COG_VAE = diffusers.CogVideoXTransformer3DModel, diffusers.AutoencoderKLCogVideoX
LTX_VAE, UNIPC = diffusers.AutoencoderKLLTXVideo, diffusers.UniPCMultistepScheduler
EULER, DDIM = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.CogVideoXDDIMScheduler
T5, CLIP = transformers.T5Config, transformers.CLIPConfig
IDEFICS, QWEN = transformers.Idefics2Config, transformers.Qwen2VLConfig

WRONG = [
    (WAN, {"in_channels": "4"}, 'a file sets in_channels to "4", expected a whole number of at least 1; fetch'),
    (WAN, {"in_channels": 4.0}, "in_channels to 4.0"),
    (WAN, {"num_layers": True}, "num_layers to true"),
    (WAN, {"num_layers": None}, "num_layers to null, expected a whole number of at least 1;"),
    (WAN, {"num_layers": 0}, "num_layers to 0, expected a whole number of at least 1"),
    (WAN, {"image_dim": -1}, "image_dim to -1, expected a whole number of at least 1 or null"),
    (WAN, {"patch_size": [1, 2]}, r"patch_size to \[1, 2\], expected a list of 3, each a whole number of at least 1"),
    (WAN, {"patch_size": [1, 2, 0]}, "patch_size to"),
    (WAN, {"patch_size": 2}, "patch_size to 2"),
    (WAN, {"cross_attn_norm": 1}, "cross_attn_norm to 1, expected true or false"),
    (WAN, {"qk_norm": {}}, "qk_norm to {}, expected a text or null"),
    (WAN, {"rope_max_seq_len": 2**30}, "expected a whole number from 1 to 131072"),
    (WAN, {"num_attention_heads": 2**20}, "expected a whole number from 1 to 4096"),
    (WAN, {"eps": -1e-6}, "eps to -1e-06, expected a number from 0 to 1"),
    (WAN, {"eps": 10**400}, "expected a number from 0 to 1"),
    (WAN_VAE, {"latents_mean": []}, r"latents_mean to \[\], expected a list, each a number that is finite"),
    (WAN_VAE, {"latents_mean": [1e39]}, "expected a list, each a number that is finite"),
    (WAN_VAE, {"latents_std": [0.0]}, r"to \[0.0\], expected a list, each a number above 0"),
    (WAN_VAE, {"temperal_downsample": [1]}, "expected a list, each true or false"),
    (WAN_VAE, {"dropout": 1.5}, "dropout to 1.5, expected a number from 0 to 1"),
    (COG, {"freq_shift": -1}, "freq_shift to -1, expected a whole number of at least 0"),
    (COG, {"sample_height": 10**6}, "expected a whole number from 1 to 8192"),
    (COG, {"spatial_interpolation_scale": 0}, "expected a number above 0"),
    (COG_VAE, {"scaling_factor": 0}, "scaling_factor to 0, expected a number above 0"),
    (COG_VAE, {"temporal_compression_ratio": 4.5}, "to 4.5, expected a whole number above 0"),
    (COG_VAE, {"block_out_channels": [8, None]}, "expected a list, each a whole number of at least 1"),
    (COG_VAE, {"down_block_types": ["x", 3]}, "expected a list, each a text"),
    (LTX_VAE, {"spatio_temporal_scaling": [True, 2]}, "expected a list, each true or false"),
    (LTX_VAE, {"spatial_compression_ratio": -32}, "expected a whole number above 0 or null"),
    (UNIPC, {"beta_start": 1e300}, r"beta_start to 1e\+300, expected a number between 0 and 1"),
    (UNIPC, {"trained_betas": [0.1, 2]}, "expected a list, each a number between 0 and 1 or null"),
    (UNIPC, {"timestep_spacing": "even"}, "expected 'linspace' or 'leading' or 'trailing'"),
    (UNIPC, {"flow_shift": 0}, "flow_shift to 0, expected a number above 0"),
    (EULER, {"shift": "3"}, 'shift to "3", expected a number above 0'),
    (EULER, {"shift_terminal": []}, "expected a number that is finite or null"),
    (DDIM, {"num_train_timesteps": 2**31}, "expected a whole number from 1 to 1048576"),
    (T5, {"num_heads": 0}, "num_heads to 0"),
    (T5, {"hidden_size": []}, "hidden_size to"),
    (T5, {"pad_token_id": "x"}, "pad_token_id to"),
    (CLIP, {"text_config": {"num_hidden_layers": -1}}, "a file: text_config sets num_hidden_layers to -1"),
    (CLIP, {"vision_config": 3}, "vision_config to 3, expected an object or null"),
    (IDEFICS, {"text_config": {"model_type": "mistral", "rms_norm_eps": []}}, "text_config sets rms_norm_eps to"),
    (QWEN, {"num_hidden_layers": 0}, "num_hidden_layers to 0"),
    (STDiT3Config, {"patch_size": [1, 2, "2"]}, "expected a list of 3, each a whole number of at least 1"),
    (STDiT3Config, {"patch_size": [1, 2]}, "expected a list of 3"),
    (STDiT3Config, {"mlp_ratio": 0}, "mlp_ratio to 0, expected a number above 0"),
    (STDiT3Config, {"class_dropout_prob": 2}, "expected a number from 0 to 1"),
    (OpenSoraVAE, {"temporal_config": {"filters": 0}}, "a file: temporal_config sets filters to 0"),
    (OpenSoraVAE, {"temporal_config": []}, r"temporal_config to \[\], expected an object"),
    (OpenSoraVAE, {"scale": [1, 0]}, "expected a list, each a number above 0"),
    (OpenSoraVAE, {"shift": 0.1}, "shift to 0.1, expected a list, each a number that is finite"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "message"), WRONG)
def test_a_value_that_a_class_cannot_take_is_named(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_settings(settings, kind, "a file")
    assert str(error.value).endswith("; fetch it again")


UNUSUAL: list[tuple[Any, dict[str, Any]]] = [
    (
        WAN,
        {"num_layers": 1, "num_attention_heads": 7, "eps": 0, "qk_norm": None, "added_by_a_finetune": [{}]},
    ),
    (WAN, {"patch_size": [1, 4, 4], "out_channels": 1, "rope_max_seq_len": 1 << 17}),
    (WAN_VAE, {"dim_mult": [1], "attn_scales": [], "temperal_downsample": [], "latents_mean": [-3]}),
    (COG, {"freq_shift": 0, "dropout": 1, "spatial_interpolation_scale": 2, "patch_size_t": None}),
    (
        COG_VAE,
        {"temporal_compression_ratio": 8, "force_upcast": True, "latents_std": None, "scaling_factor": 1},
    ),
    (
        LTX_VAE,
        {"block_out_channels": [8] * 5, "spatial_compression_ratio": None, "latents_mean": "a finetune's"},
    ),
    (UNIPC, {"sigma_max": 80.5, "solver_p": None, "disable_corrector": [0], "steps_offset": 1}),
    (EULER, {"shift_terminal": 0.1, "base_shift": -1, "max_shift": 3}),
    (T5, {"num_decoder_layers": 0, "pad_token_id": -1, "eos_token_id": [1, 2], "torch_dtype": "bfloat16"}),
    (CLIP, {"projection_dim": 8, "text_config": {"eos_token_id": 2}, "vision_config": None}),
    (IDEFICS, {"text_config": {"model_type": "a later one", "num_layers": 0}}),
    (STDiT3Config, {"mlp_ratio": 2, "class_dropout_prob": 0}),
    (OpenSoraVAE, {"micro_batch_size": None, "spatial_scaling": 1, "vae_2d": {"type": "x"}}),
]


@pytest.mark.parametrize(("kind", "settings"), UNUSUAL)
def test_a_value_that_is_only_unusual_is_taken(kind: Any, settings: dict[str, Any]) -> None:
    check_settings(settings, kind, "a file")


def test_a_setting_that_the_engine_needs_is_not_null() -> None:
    check_settings({"scale_factor_spatial": None}, WAN_VAE, "a file")
    with pytest.raises(
        ValueError, match="scale_factor_spatial to null, expected a whole number of at least 1;"
    ):
        check_settings({"scale_factor_spatial": None}, WAN_VAE, "a file", needed=["scale_factor_spatial"])


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    inner: Inner | None = None


def test_an_object_may_be_left_out_and_is_checked_where_it_is_not() -> None:
    for taken in ({}, {"inner": None}, {"inner": {}}, {"inner": {"size": 2}}):
        check_settings(taken, Outer, "a file")
    with pytest.raises(ValueError, match="a file: inner sets size to 0"):
        check_settings({"inner": {"size": 0}}, Outer, "a file")
    with pytest.raises(ValueError, match="inner to 3, expected an object or null"):
        check_settings({"inner": 3}, Outer, "a file")


def test_defaults_are_filled_in_under_the_names_of_the_class() -> None:
    made = completed({"hidden_size": 8, "more": 1}, T5)
    assert (made["d_model"], made["d_kv"], made["more"]) == (8, 64, 1)
    assert "hidden_size" not in made


def diffusers_classes() -> list[str]:
    ends = ("Model", "Scheduler", "Transformer2D")
    return [name for name in dir(diffusers) if name.endswith(ends) or name.startswith("Autoencoder")]


def test_the_defaults_of_all_classes_are_taken() -> None:
    checked = 0
    for name in diffusers_classes():
        try:
            kind = getattr(diffusers, name)
            known = _parameters(kind)
        except ImportError:  # of a package that is not installed
            continue
        check_settings(_as_json({key: default for key, (_, default) in known.items()}), kind, name)
        checked += 1
    for model in ("t5", "umt5", "clip", "idefics2", "qwen2_vl", "qwen2_5_vl", "mistral", "blip_text_model"):
        kind = transformers.CONFIG_MAPPING[model]
        check_settings(json.loads(kind().to_json_string(use_diff=False)), kind, model)
    assert checked > 100


def _as_json(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that a JSON file can have, as it has them."""
    kept: dict[str, Any] = json.loads(json.dumps(defaults, default=lambda value: "left out"))
    return {key: value for key, value in kept.items() if value != "left out"}
