"""The sprites model with two prompts, counted calls, and the sampler that public scripts are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from small_policy import shipped_policy_is_small
from step_case import Judge, sample_candidates
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config import RolloutConfig
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.assets import FLOW, GEOMETRY
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.protocols import TextEmbedding
from vpo_engine.seeding import normal

PROMPTS = ("a red circle moving left", "a yellow triangle moving up")
"""Of different lengths."""
CPU = torch.device("cpu")
STEPS = 4
SIZE = {"fps": float(GEOMETRY.fps), "height": GEOMETRY.height, "width": GEOMETRY.width}


@functools.cache
def sprites() -> tuple[OpenSora, TextEmbedding]:
    """Return the model, with few weights, and the text of the prompts. To be left as they are."""
    with shipped_policy_is_small():
        model = build_model(load_config(None), Processes.start("cpu"), lambda _: None)
    model.prepare(PROMPTS)
    return model, model.embed(PROMPTS)


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"candidates": 4, "steps": STEPS, "guidance": 3.0, **changes})


def sampled(config: RolloutConfig, network: Any = None, judge: Judge | None = None) -> Tensor:
    """Candidates of the two prompts, at positions 7 and 8."""
    model, text = sprites()
    return sample_candidates(model, network or model.network, text, [7, 8], config, 0, CPU, judge)


def noise_of(config: RolloutConfig) -> Tensor:
    shape = (config.candidates, *sprites()[0].latent_shape)
    return torch.stack([normal(shape, 0, "rollout", position) for position in (7, 8)])


def schedule(steps: int) -> list[tuple[float, float]]:
    """(time, length) of each step."""
    times, lengths = FLOW.sampling_timesteps(steps, GEOMETRY.height, GEOMETRY.width, GEOMETRY.num_frames)
    return list(zip(times.tolist(), lengths.tolist(), strict=True))


@torch.no_grad()
def alone(z: Tensor, prompt: int, guidance: float, steps: Sequence[tuple[float, float]]) -> Tensor:
    """One candidate [C, T, H, W] as public scripts sample it: a batch of one, a call for each branch of guidance."""
    model, text = sprites()
    network = model.network
    length = int(text.mask[prompt].sum())
    caption = text.embeddings[prompt, :length][None, None]
    null = network.y_embedder.y_embedding[:length][None, None]
    z = z[None]
    for time, size in steps:
        t = torch.tensor([time])
        prompted = network(z, t, caption, **SIZE)[:, : z.shape[1]]
        unprompted = network(z, t, null, **SIZE)[:, : z.shape[1]]
        z = z + (unprompted + guidance * (prompted - unprompted)) * size
    return z[0]


@torch.no_grad()
def batched(
    z: Tensor, guidance: float | Callable[[float], float], steps: Sequence[tuple[float, float]]
) -> Tensor:
    """Candidates [2, N, ...] in one batch with a caption for each row, everything computed in every step."""
    model, text = sprites()
    rows, text = z.flatten(0, 1), text.repeat_interleave(z.shape[1])
    for time, size in steps:
        scale = guidance(time) if callable(guidance) else guidance
        rows = rows + model.predict(model.network, rows, torch.full((len(rows),), time), text, scale) * size
    return rows.view(z.shape)


class Counting:
    """Stands before a network and notes the rows of each call."""

    def __init__(self, network: STDiT3) -> None:
        self.network = network
        self.rows: list[int] = []

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.rows.append(len(x))
        return self.network(x, *args, **kwargs)


class Failing:
    """Stands before a network and runs out of memory in the calls of these numbers."""

    def __init__(self, network: Callable[..., Tensor], *calls: int) -> None:
        self.network, self.calls = network, calls
        self.rows: list[int] = []

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.rows.append(len(x))
        if len(self.rows) in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.network(x, *args, **kwargs)
