"""Run the parts of a model once without weights, so that what cannot run is refused before the weights are read.

A class of diffusers can be built by settings with which it cannot run: numbers of channels that do not fit one another,
a list where arithmetic wants a number. Tensors on the meta device have a shape and no values, so a rehearsal takes
little memory and time, whatever the sizes are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.model_values import TextEmbedding
from vpo_engine.models.base import BaseModel
from vpo_engine.models.diffusers_folder import CONFIG

META = torch.device("meta")
MOST_TOKENS = 1 << 15
"""Tokens to which a prompt is padded; published models have up to 512."""
_passed = set[str]()


def once(rehearsal: Callable[[], object], *what: object) -> None:
    """Rehearse what has not passed before in this process: commands load several models of the same settings.

    what: all that the rehearsal depends on; two that print alike are the same.
    """
    key = repr(what)
    if key not in _passed:
        rehearsal()
        _passed.add(key)


@dataclass(frozen=True)
class Described:
    """A part of a class of diffusers, as the config.json in a folder describes it."""

    name: str
    folder: Path

    def attempt(self, run: Callable[[], object]) -> None:
        """Raise ValueError, naming the file, where ``run`` fails."""
        try:
            run()
        except (
            NotImplementedError
        ):  # an operation that needs values, or has no shapes, says nothing of the settings
            return
        except Exception as error:  # a class can fail in any way on settings that it never had
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"{self.folder / CONFIG} does not describe a {self.name} that can run ({type(error).__name__}: "
                f"{reason}); fetch the folder again"
            ) from error


def check_tokens(tokens: object, transformer: Path) -> None:
    """Raise ValueError unless a transformer's folder gives a prompt a number of tokens to which a model may pad."""
    if type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(
            f"{transformer / CONFIG} gives a prompt {str(tokens)[:100]} tokens, expected from 1 to {MOST_TOKENS}; "
            "fetch the folder again"
        )


@torch.no_grad()
def rehearse(model: BaseModel, network: Described, vae: Described) -> None:
    """Let a model on the meta device predict and decode one sample.

    Raise ValueError if its network or its VAE fails, or gives results of another shape than the model has.
    """
    rule = model.text_rule
    model.device = torch.device("cpu")  # the meta device has no autocast
    latents, times = torch.zeros(1, *model.latent_shape, device=META), torch.zeros(1, device=META)
    text = TextEmbedding(
        torch.zeros(1, rule.max_tokens, rule.channels, device=META),
        torch.ones(1, rule.max_tokens, dtype=torch.bool),
    )

    assert model.video_size is not None, "families of diffusers know the size of their videos"
    frames = (1, *model.video_size, 3)

    def predict() -> None:
        _check_shape(model.predict(model.network, latents, times, text), latents.shape)

    def decode() -> None:
        _check_shape(model.to_video(latents), frames)

    network.attempt(predict)
    vae.attempt(decode)


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"it gives {list(tensor.shape)} where {list(shape)} is needed")
