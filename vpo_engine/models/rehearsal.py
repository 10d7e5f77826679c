"""Run the parts of a model once without weights, so that what cannot run is refused before the weights are read.

A class of diffusers can be built by settings with which it cannot run: numbers of channels that do not fit one another,
a list where arithmetic wants a number. Tensors on the meta device have a shape and no values, so a rehearsal takes
little memory and time, whatever the sizes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.foreign_settings import described_by
from vpo_engine.model_values import TextEmbedding
from vpo_engine.models.base import BaseModel
from vpo_engine.models.diffusers_folder import AGAIN
from vpo_engine.video_model import Solver

META = torch.device("meta")
MOST_TOKENS = 1 << 15
"""Tokens to which a prompt is padded; published models have up to 512."""
REHEARSED = 8
"""Steps in which a solver is rehearsed."""
_passed = set[str]()


def once(rehearsal: Callable[[], object], *what: object) -> None:
    """Rehearse what has not passed before in this process: commands load several models of the same settings.

    what: all that the rehearsal depends on; two that print alike are the same.
    """
    key = repr(what)
    if key not in _passed:
        rehearsal()
        _passed.add(key)


@contextmanager
def rehearsing(where: Path | str, name: str) -> Iterator[None]:
    """Raise ValueError, naming the file ``where`` the settings are from, if the part ``name`` fails in the block."""
    with described_by(where, f"{name} that can run", AGAIN), suppress(NotImplementedError):
        yield  # an operation that needs values, or has no shapes, says nothing of the settings


def check_tokens(tokens: object, where: Path | str) -> None:
    """Raise ValueError unless a transformer's settings give a prompt a number of tokens to which a model may pad."""
    if type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(
            f"{where} gives a prompt {str(tokens)[:100]} tokens, expected from 1 to {MOST_TOKENS}; {AGAIN}"
        )


@torch.no_grad()
def rehearse(model: BaseModel, network: tuple[str, str], vae: tuple[str, str]) -> None:
    """Let a model on the meta device predict and decode one sample.

    network, vae: the files that their settings are from, and the names of their classes. Raise ValueError if one of
    them fails, or gives results of another shape than the model has.
    """
    rule = model.text_rule
    model.device = torch.device("cpu")  # the meta device has no autocast
    latents, times = torch.zeros(1, *model.latent_shape, device=META), torch.zeros(1, device=META)
    text = TextEmbedding(
        torch.zeros(1, rule.max_tokens, rule.channels, device=META),
        torch.ones(1, rule.max_tokens, dtype=torch.bool),
    )
    assert model.video_size is not None, "families of diffusers know the size of their videos"
    with rehearsing(*network):
        _check_shape(model.predict(model.network, latents, times, text), latents.shape)
    with rehearsing(*vae):
        _check_shape(model.to_video(latents), (1, *model.video_size, 3))


def rehearse_solver(solver: Solver, where: Path | str) -> None:
    """Let a solver take its steps with one number. Raise ValueError if it fails, or gives a number that is not finite.

    where: the file that the settings of its scheduler are from.
    """
    latents, before = torch.ones(()), math.inf
    memory: tuple[Tensor, ...] = ()
    with rehearsing(where, "scheduler"):
        for step, time in enumerate(solver.times):
            level = solver.noise_level(step)
            if not (time >= 0 and 0 < level <= 1 and level < before):
                raise ValueError(
                    f"noise of level {level:g} at time {time:g} in step {step + 1}, where noise falls from 1 to 0"
                )
            before = level
            latents, memory = solver.advance(step, latents, latents, memory)
        if not bool(latents.isfinite()):
            raise ValueError(f"{len(solver.times)} steps end at {float(latents)}")


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"it gives {list(tensor.shape)} where {list(shape)} is needed")
