"""The published checkpoint of VideoReward: its settings, its LoRA matrices, its sizes and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2VLConfig

from vpo_engine import foreign_settings
from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.loading import parse_config, read_config, read_tokenizer

DIMENSIONS = ("visual_quality", "motion_quality", "text_alignment")
MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
"""The tokens that the dimensions are read at, in the order of the question."""

REMEDY = "VideoAlign needs a whole local copy of KlingTeam/VideoReward"
NAME = "VideoAlign"

QWEN2_VL_2B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 32768,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
}
"""Sizes of the base, Qwen2-VL-2B-Instruct."""


def merge_lora(weights: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Return the plain weights of a PEFT state dict: W + scale * B @ A, computed in float32, in W's type.

    Names lose "base_model.model." and ".base_layer"; lm_head, which plays no part, is dropped. A state dict without
    adapters passes with its names. Raise ValueError for half an adapter, or one without a matrix of its size.
    """
    plain: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, weight in weights.items():
        name = key.removeprefix("base_model.model.")
        module, _, half = name.removesuffix(".default.weight").rpartition(".")
        if half in halves:
            halves[half][f"{module}.weight"] = weight
        elif not name.startswith("lm_head."):
            plain[name.replace(".base_layer.", ".")] = weight
    for name in sorted({*halves["lora_A"], *halves["lora_B"]}):
        down, up, base = halves["lora_A"].get(name), halves["lora_B"].get(name), plain.get(name)
        if down is None or up is None or base is None or (up.shape[0], down.shape[1]) != base.shape:
            shapes = [None if part is None else list(part.shape) for part in (down, up, base)]
            raise ValueError(f"adapter of {name}: lora_A, lora_B and weight have shapes {shapes}; {REMEDY}")
        plain[name] = (base.float() + scale * (up.float() @ down.float())).to(base.dtype)
    return plain


@dataclass(frozen=True)
class _Data:
    fps: float = 2.0
    max_frame_pixels: int = 448 * 448


@dataclass(frozen=True)
class _Lora:
    lora_r: int = 64
    lora_alpha: float = 128.0
    use_rslora: bool = False


@dataclass(frozen=True)
class _Inference:
    VQ_mean: float
    MQ_mean: float
    TA_mean: float
    VQ_std: float
    MQ_std: float
    TA_std: float


@dataclass(frozen=True)
class _Settings:
    """What is read of model_config.json, beside what must have one value."""

    data_config: _Data
    peft_lora_config: _Lora
    inference_config: _Inference | None = None


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of another model than VideoReward, and for values that it cannot have."""
    foreign_settings.check_settings(settings, _Settings, folder / "model_config.json", REMEDY)
    expected: dict[str, dict[str, object]] = {
        "data_config": {
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
            "num_frames": None,
        },
        "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    }
    for part, fields in expected.items():
        found = settings.get(part)
        if not isinstance(found, dict):
            raise ValueError(f"{folder / 'model_config.json'} has no {part}; {REMEDY}")
        for key, value in fields.items():
            if found.get(key, value) != value:
                raise ValueError(
                    f"{folder / 'model_config.json'} has {part}.{key} {found[key]!r}, expected {value!r}; {REMEDY}"
                )


def lora_scale(settings: Mapping[str, Any]) -> float:
    """Return the factor of the adapter's product."""
    fields = settings.get("peft_lora_config", {})
    rank = float(fields.get("lora_r", 64))
    return float(fields.get("lora_alpha", 128)) / (rank**0.5 if fields.get("use_rslora") else rank)


def read_calibration(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[float, float]] | None:
    """Return the mean and standard deviation of each dimension, or None where the checkpoint has none."""
    fields = settings.get("inference_config")
    if fields is None:
        return None
    try:
        pairs = [(float(fields[f"{key}_mean"]), float(fields[f"{key}_std"])) for key in ("VQ", "MQ", "TA")]
    except KeyError as error:
        raise ValueError(
            f"{folder / 'model_config.json'} has no inference_config.{error.args[0]}; {REMEDY}"
        ) from error
    return dict(zip(DIMENSIONS, pairs, strict=True))


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint-* folder of the highest step. Raise FileNotFoundError without one."""
    steps = {int(step): path for path in folder.glob("checkpoint-*") if (step := path.name[11:]).isdigit()}
    if not steps:
        raise FileNotFoundError(f"no checkpoint-* folder in {folder}; {REMEDY}")
    return steps[max(steps)]


def read_base_config(folder: Path, weights: Mapping[str, Tensor]) -> Qwen2VLConfig:
    """Read the base's sizes, with as many embeddings as the checkpoint has: training cuts them to the tokenizer."""
    fields: dict[str, Any] = {"model_type": "qwen2_vl", **QWEN2_VL_2B}
    if (folder / "config.json").is_file():
        fields = read_config(folder, "qwen2_vl", REMEDY)
    embeddings = weights.get("model.embed_tokens.weight")
    if embeddings is not None:
        fields = {**fields, "vocab_size": len(embeddings)}
    return parse_config(Qwen2VLConfig, fields, folder, REMEDY)


def read_marked_tokenizer(folder: Path, checkpoint: Path, config: Qwen2VLConfig) -> Tokenizer:
    """Read the tokenizer, of the checkpoint or else of the folder; it must have the tokens of the question."""
    places = [place / "tokenizer.json" for place in (checkpoint / "tokenizer", checkpoint, folder)]
    path = next((place for place in places if place.is_file()), places[0])
    expected = dict.fromkeys(
        (*MARKS, qwen_vl.VISION_START, qwen_vl.VISION_END, qwen_vl.TURN_START, qwen_vl.TURN_END)
    )
    return read_tokenizer(
        path, {qwen_vl.VIDEO: config.video_token_id, **expected}, config.text_config.vocab_size, REMEDY
    )
