"""The parts of a run without weights, built from configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Idefics2Config

from vpo_engine.config import Config
from vpo_engine.config.presets import MEMORY_PRESETS
from vpo_engine.foreign_files import read_settings
from vpo_engine.models.registry import check_model, model_family
from vpo_engine.planning.tracker import Tracker
from vpo_engine.rewards.registry import reward_card
from vpo_engine.rewards.videoscore import VideoScoreNetwork
from vpo_engine.video_model import Blueprint, Solver, VideoModel
from vpo_engine.weights import config_file

_PLANNED = ("videoscore", "videoscore_v1_1")
"""Rewards whose network is traced."""
_NEGLIGIBLE = 10**7
"""Parameters of a reward that need no planning."""
CPU, META = torch.device("cpu"), torch.device("meta")

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
        """Return the contents of the folder's config.json, else the published ones with a note."""
        if folder is not None and (file := config_file(folder)) is not None:
            return read_settings(file, "download it again")
        self.notes.append(f"{folder} has no config.json here, so the sizes of {name} are taken")
        return dict(published)


def configurations_are_here(config: Config) -> bool:
    """Return whether the run can be planned without assuming any size.

    Every folder that the configuration names must hold a config.json, and the model's family must have a blueprint.
    """
    family = model_family(config.model.kind)
    names = {"policy", *family.card.files}
    reward = config.reward.path if config.reward.kind in _PLANNED else None
    folders = (*(getattr(config.model, name) for name in sorted(names)), reward)
    if not all(_is_described(folder) for folder in folders if folder is not None):
        return False
    assumed = Assumed()
    return family.blueprint(config.model, assumed.config, 1) is not None and not assumed.notes


def check_preset(config: Config) -> None:
    """Raise ValueError for a preset that a plan must resolve, of a family that cannot be planned."""
    open_settings = [name for name in MEMORY_PRESETS["lean"] if config.memory.chooses(name)]
    if open_settings and model_family(config.model.kind).blueprint(config.model, Assumed().config, 1) is None:
        raise ValueError(
            f"memory.preset=balanced takes its settings from a plan, but model.kind={config.model.kind} cannot be "
            "planned: its class has no blueprint (see docs/models.md); set memory.preset=lean, or fast"
        )


def _is_described(folder: Path) -> bool:
    """Return whether a folder says the sizes of its weights: those of a model, or of the parts of a pipeline."""
    return config_file(folder) is not None or (folder / "model_index.json").is_file()


def blueprint_of(config: Config, assumed: Assumed, depth: int | None = None) -> Blueprint:
    """Return the configured model without weights; ``depth`` is other than configured, for extrapolation.

    Raise ValueError for a family that cannot be planned.
    """
    check_model(config)
    family = model_family(config.model.kind)
    blueprint = family.blueprint(config.model, assumed.config, depth)
    if blueprint is None:
        raise ValueError(
            f"model.kind={config.model.kind} ({family.card.name}) cannot be planned: its class has no blueprint (see "
            "docs/models.md). Its runs start without a plan; set rollout.batch_size to a number"
        )
    model = blueprint.model
    model.use_memory(config.memory)
    model.solver = _without_modes(model.solver)  # type: ignore[method-assign, assignment]
    return blueprint


def _without_modes(function: Callable[[int], Solver]) -> Callable[[int], Solver]:
    """Compute with true numbers under FakeTensorMode: a solver's times say which steps are guided."""

    def called(steps: int) -> Solver:
        with _disable_current_modes():
            return function(steps)

    return called


def configured_depth(config: Config) -> int:
    """Return the number of blocks in each list of the policy's repeating blocks."""
    return blueprint_of(config, Assumed(), 1).depth


def materialise_model(model: VideoModel, tracker: Tracker, device: torch.device = CPU) -> None:
    """Give the parts of a blueprint's model uninitialised tensors, fake ones in FakeTensorMode.

    (``Module.to`` cannot exchange fake parameters.)
    """
    model.device = device
    for name, part in model.parts.items():
        with tracker.making("weights" if name == "policy" else name):
            materialise(part, None if name == "policy" else model.dtype, device)


def build_reward_network(config: Config, assumed: Assumed) -> VideoScoreNetwork | None:
    """Return VideoScore's network on the meta device.

    It is None for other rewards (see ``bare_weights``), and for a reward on another device.
    """
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
    """Return the bytes of the "reward" model and of the "judge" (the held-out reward) that only their cards tell.

    These are their weights in 16 bits. A note says so; models of negligible size are left out.
    """
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


def materialise(module: nn.Module, dtype: torch.dtype | None = None, device: torch.device = CPU) -> None:
    """Put uninitialised tensors on ``device`` in place of those on the meta device, floats in ``dtype``.

    Shared tensors stay shared.
    """
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


def release(module: nn.Module) -> None:
    """Release the tensors of a module."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.clear()
