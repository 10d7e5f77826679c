"""Models of tiny Wan and LTX-Video folders, and what their pipelines in diffusers make of the same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flow_folders import NEGATIVE, PROMPTS
from torch import Tensor

from vpo_engine.config import ModelConfig
from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.data.text_source import TextSource
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.registry import model_family
from vpo_engine.video_model import Encoder, LoadContext

CPU = torch.device("cpu")


def load_model(kind: str, folder: Path, cache: Path | None = None, **settings: Any) -> Any:
    """Load a model of 9 frames of 64 x 96 pixels as a run would; ``settings`` are those of ``model``."""
    given = {"height": 64, "width": 96, "num_frames": 9, "negative_prompt": NEGATIVE, **settings}
    config = ModelConfig.model_validate({"kind": kind, "policy": folder, **given})
    family = model_family(kind)
    family.check(config)

    def text_source(
        load_encoder: Callable[[], Encoder],
        encoder_id: str,
        rewrite: Callable[[str], str] = str,
        *,
        on_disk: bool = True,
    ) -> TextSource:
        return TextSource(EmbeddingCache(cache, encoder_id), load_encoder, Processes.start("cpu"), rewrite)

    dtype = getattr(torch, config.dtype)
    return family.load(config, LoadContext(CPU, dtype, text_source))


def noise_for(model: Any, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def sampled(model: Any, noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Return the engine's latents: all prompts, each with its candidates next to each other, in one batch."""
    model.prepare(PROMPTS)
    latents: Tensor = model.sample(model.network, noise, model.embed(PROMPTS), steps=steps, guidance=guidance)
    return latents


def repeated(prompts: Sequence[str], count: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(count // len(prompts))]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def changed(folder: Path, tmp_path: Path, part: str, **values: Any) -> Path:
    """Copy a pipeline's folder with other values in one of its JSON files, and return the copy."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    file = copy / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return copy
