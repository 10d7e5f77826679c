"""The parts of a run as fake tensors: built from configurations alone, no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Idefics2Config, T5Config, T5EncoderModel

from vpo_engine.build import DTYPES
from vpo_engine.config import Config
from vpo_engine.data.sprites.assets import GEOMETRY, WEIGHTS
from vpo_engine.data.sprites.pretrain import FLOW
from vpo_engine.memory.checkpointing import Activations
from vpo_engine.models.opensora.checkpoint import load_config
from vpo_engine.models.opensora.geometry import pixel_size
from vpo_engine.models.opensora.model import Geometry, OpenSora
from vpo_engine.models.opensora.rectified_flow import RectifiedFlow
from vpo_engine.models.opensora.stdit3 import STDiT3, STDiT3Config
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.planning.tracker import Tracker
from vpo_engine.protocols import TextEmbedding
from vpo_engine.rewards.registry import reward_card
from vpo_engine.rewards.videoscore import VideoScoreNetwork

_PLANNED = ("videoscore", "videoscore_v1_1")
"""Rewards whose network is traced."""
_NEGLIGIBLE = 10**7
"""Parameters of a reward that need no planning."""
CPU, META = torch.device("cpu"), torch.device("meta")

STDIT3_XL2: dict[str, Any] = {"freeze_y_embedder": True}
"""hpcai-tech/OpenSora-STDiT-v3, where it differs from the class's defaults."""

VAE_V1_2: dict[str, Any] = {
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.10, 0.34, 0.27, 0.98],
    "vae_2d": {"from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"},
    "vae_temporal": {"type": "VAE_Temporal_SD"},
}
"""hpcai-tech/OpenSora-VAE-v1.2."""

T5_V1_1_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
"""DeepFloyd/t5-v1_1-xxl."""

IDEFICS2_8B: dict[str, Any] = {
    "text_config": {"model_type": "mistral", "vocab_size": 32003, "max_position_embeddings": 32768},
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
"""TIGER-Lab/VideoScore, whose trunk has the sizes of HuggingFaceM4/idefics2-8b."""


@dataclass
class Assumed:
    """Published sizes that stand for files which are not here."""

    notes: list[str] = field(default_factory=list)

    def config(self, folder: Path | None, published: Mapping[str, Any], name: str) -> dict[str, Any]:
        """``folder``'s config.json, else the published one, with a note."""
        if folder is not None and (folder / "config.json").is_file():
            return load_config(folder)
        self.notes.append(f"{folder} has no config.json here: sizes of {name}")
        return dict(published)


def configurations_are_here(config: Config) -> bool:
    """Whether every folder that the configuration names holds a config.json, so that no size has to be assumed."""
    reward = config.reward.path if config.reward.kind in _PLANNED else None
    folders = (config.model.policy, config.model.vae, config.model.text_encoder, reward)
    return all((folder / "config.json").is_file() for folder in folders if folder is not None)


class PlannedModel(OpenSora):
    """The video model without weights: on the meta device until it is given fake tensors."""

    def materialise(self, tracker: Tracker, device: torch.device = CPU) -> None:
        """Give it uninitialised tensors, fake ones in FakeTensorMode. (Module.to cannot exchange fake parameters.)"""
        self.device = device
        with tracker.making("weights"):
            materialise(self.network, None, device)
        with tracker.making("vae"):
            materialise(self.vae, self.dtype, device)

    def schedule(self, steps: int) -> tuple[list[float], list[float]]:
        """True numbers: they say which steps are guided."""
        with _disable_current_modes():
            return super().schedule(steps)

    @property
    def decoders(self) -> list[nn.Module]:
        """What decodes a micro-batch of frames, whole or in strips, and a chunk of latents."""
        images = self.vae.spatial_vae
        return [images.module.decoder, images.strips, self.vae.temporal_vae.decoder]


class _NoText:
    """Embeddings are given to the model directly."""

    def prepare(self, prompts: Sequence[str]) -> None:
        raise AssertionError

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        raise AssertionError


def configured_depth(config: Config) -> int:
    """Pairs of blocks of the policy."""
    return STDiT3Config.from_dict(_network_config(config, Assumed())).depth


def _network_config(config: Config, assumed: Assumed) -> dict[str, Any]:
    if config.model.kind == "sprites":
        return load_config(config.model.policy or WEIGHTS / "policy")
    return assumed.config(config.model.policy, STDIT3_XL2, "STDiT3-XL/2")


def build_model(config: Config, assumed: Assumed, depth: int | None) -> tuple[PlannedModel, int]:
    """Policy and VAE, and the network's configured depth; ``depth`` is another, for extrapolation."""
    settings, network_config = config.model, _network_config(config, assumed)
    if settings.kind == "sprites":
        vae_config, geometry, flow = load_config(WEIGHTS / "vae"), GEOMETRY, FLOW
    else:
        vae_config = assumed.config(settings.vae, VAE_V1_2, "OpenSora-VAE-v1.2")
        geometry = Geometry(
            *pixel_size(settings.resolution, settings.aspect), settings.num_frames, settings.fps
        )
        flow = RectifiedFlow(use_timestep_transform=True)
    configured = STDiT3Config.from_dict(network_config).depth
    network_config["depth"] = depth or configured
    with META:
        network, vae = STDiT3.from_config(network_config), OpenSoraVAE.from_config(vae_config)
    memory = config.memory
    network.activations = Activations(memory.recompute, memory.offload, memory.mlp_chunks)
    dtype = DTYPES[settings.dtype]
    model = PlannedModel(network, vae, _NoText(), geometry, flow, device=META, dtype=dtype)
    model.decode_frames, model.decode_rows = memory.decode_frames, memory.decode_rows
    return model, configured


def build_reward_network(config: Config, assumed: Assumed) -> VideoScoreNetwork | None:
    """VideoScore's network, on the meta device; None for other rewards (see ``bare_weights``) and on another device."""
    if config.processes.reward:
        assumed.notes.append("the reward model has a process, and a device, of its own, which is not planned")
        return None
    if config.reward.device != "auto":
        assumed.notes.append(f"the reward model is on {config.reward.device}, which is not planned")
        return None
    if config.reward.process:
        assumed.notes.append("in a process of its own the reward model stays on the device in every phase")
    if config.reward.kind not in _PLANNED:
        return None
    fields = assumed.config(config.reward.path, IDEFICS2_8B, "VideoScore (Idefics2-8B)")
    with META:
        network = VideoScoreNetwork(Idefics2Config.from_dict(fields))
    return network.eval().requires_grad_(False)


def bare_weights(config: Config, assumed: Assumed) -> dict[str, int]:
    """Bytes of the "reward" model and of the "judge", the held-out reward, where they are known by their cards alone:
    their weights in 16 bits. Noted; without those that are negligible."""
    kinds: dict[str, str] = {}
    if config.reward.kind not in _PLANNED and config.reward.device == "auto" and not config.processes.reward:
        kinds["reward"] = config.reward.kind
    if config.guards.reward is not None:
        kinds["judge"] = config.guards.reward.kind
    found = {}
    for part, kind in kinds.items():
        card = reward_card(kind)
        if card.parameters > _NEGLIGIBLE:
            assumed.notes.append(
                f"of {card.name} only its weights are planned, {card.gib_bf16:.1f} GiB: neither activations nor seconds"
            )
            found[part] = 2 * card.parameters
    return found


def build_text_encoder(config: Config, assumed: Assumed) -> T5EncoderModel:
    if config.model.kind == "sprites":
        fields = load_config(WEIGHTS / "text_encoder")
    else:
        fields = assumed.config(config.model.text_encoder, T5_V1_1_XXL, "T5 v1.1 XXL")
    with META:
        encoder = T5EncoderModel(T5Config(**fields))
    return encoder.eval().requires_grad_(False)


def materialise(module: nn.Module, dtype: torch.dtype | None = None, device: torch.device = CPU) -> None:
    """Uninitialised tensors on ``device`` in place of those on the meta device, floats in ``dtype``; shared ones stay
    shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=kind, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                held[name] = made[id(tensor)]
