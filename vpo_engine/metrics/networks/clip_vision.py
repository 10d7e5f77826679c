"""The image tower of OpenAI's CLIP through transformers, from its .pt archives or a folder of transformers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from vpo_engine.metrics.networks.checkpoints import depth_of, size_of
from vpo_engine.rewards.clip import load_clip
from vpo_engine.rewards.loading import build, parse_config, read_config, read_weights

B32_FILE, L14_FILE = "ViT-B-32.pt", "ViT-L-14.pt"
_PLACES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCKS, _LAYERS = "transformer.resblocks.", "encoder.layers."


def clip_from_weights(
    weights: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    name: str = "CLIP",
    where: str | Path = "the state dict",
    device: torch.device | str = "cpu",
) -> CLIPVisionModelWithProjection:
    """Make the image tower of OpenAI's weights, in float32; heads have 64 channels by default.

    ``weights``: with the prefix ``visual.``, the text tower's beside them, or without. Raise ValueError, naming
    ``where`` and keys, for weights of another network.
    """
    visual = {key.removeprefix("visual."): each for key, each in weights.items() if key.startswith("visual.")}
    plain = visual or dict(weights)
    width = size_of(plain, "conv1.weight", 0, name)
    patch = size_of(plain, "conv1.weight", 3, name)
    side = round((size_of(plain, "positional_embedding", 0, name) - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=size_of(plain, f"{_BLOCKS}0.mlp.c_fc.weight", 0, name),
        projection_dim=size_of(plain, "proj", 1, name),
        num_hidden_layers=depth_of(plain, _BLOCKS),
        num_attention_heads=heads or width // 64,
        image_size=side * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    remedy = f"give OpenAI's archive of {name}, or a folder of openai/clip-vit-* in transformers' layout"
    return _load(config, _converted(plain), where=where, name=name, remedy=remedy, device=device)


def clip_from_folder(
    folder: Path, *, name: str = "CLIP", device: torch.device | str = "cpu"
) -> CLIPVisionModelWithProjection:
    """Make the image tower of a folder with config.json and weights of transformers' CLIP, in float32."""
    remedy = f"give the folder of {name} as transformers saves it, or OpenAI's archive"
    fields = read_config(folder, "clip", remedy)
    config = parse_config(CLIPConfig, fields, folder, remedy).vision_config
    config.projection_dim = fields.get("projection_dim") or config.projection_dim
    return _load(config, read_weights(folder, remedy), where=folder, name=name, remedy=remedy, device=device)


def _load(
    config: CLIPVisionConfig,
    weights: Mapping[str, Tensor],
    *,
    where: str | Path,
    name: str,
    remedy: str,
    device: torch.device | str,
) -> CLIPVisionModelWithProjection:
    network = build(lambda: CLIPVisionModelWithProjection(config), where, name, remedy)
    load_clip(
        network,
        weights,
        where=where,
        model=name,
        remedy=remedy,
        dtype=torch.float32,
        device=device,
        unused=("text_model.", "text_projection.", "logit_scale"),
    )
    return network.eval().requires_grad_(False)


def _converted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return OpenAI's weights under transformers' names; what has no counterpart keeps its name, for the loader."""
    found: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if key == "proj":
            found["visual_projection.weight"] = weight.mT
        elif key.startswith(_BLOCKS):
            number, _, rest = key.removeprefix(_BLOCKS).partition(".")
            found |= _of_block(f"vision_model.{_LAYERS}{number}.", rest, weight)
        else:
            found[_renamed(key, _PLACES, "vision_model.") or key] = weight
    return found


def _of_block(place: str, key: str, weight: Tensor) -> dict[str, Tensor]:
    if key.startswith("attn.in_proj_"):
        kind = key.removeprefix("attn.in_proj_")
        parts = zip("qkv", weight.chunk(3), strict=True)
        return {f"{place}self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    return {_renamed(key, _IN_BLOCK, place) or place + key: weight}


def _renamed(key: str, names: Mapping[str, str], place: str) -> str | None:
    for name, new in names.items():
        if key == name or key.startswith(f"{name}."):
            return place + new + key.removeprefix(name)
    return None
