"""Recordings of a diffusers pipeline and of a family: what they ask of the network and of the VAE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("hidden_states", "timestep", "encoder_hidden_states")
"""Arguments of a diffusers transformer that are compared by checks of their own; only the first comes by position."""
_LEFT_OUT = (*_NAMES, "return_dict", "attention_kwargs")


@dataclass
class Call:
    """A call of the network: latents in its own layout, times, text, other arguments, and what it predicted."""

    latents: Tensor
    time: Tensor
    text: Tensor
    others: dict[str, Any]
    prediction: Tensor

    @property
    def mask(self) -> Tensor | None:
        """Return the mask of the text's tokens, if the network gets one."""
        found = self.others.get("encoder_attention_mask")
        return None if found is None else found.bool()


@dataclass
class Recording:
    """A sampling loop: the network's calls, latents after each step in the network's layout, and what was decoded."""

    calls: list[Call] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    scheduler: Any = None
    """A copy of the pipeline's scheduler after the loop."""
    frames: Tensor | None = None
    """Frames [F, height, width, 3], from 0 to 255, not rounded."""


@contextmanager
def record_calls(network: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Append every call of a diffusers transformer to ``calls``."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        others = {key: value for key, value in given.items() if key not in _LEFT_OUT and value is not None}
        latents, time, text = (given[name].detach().clone() for name in _NAMES)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        calls.append(Call(latents, time, text, others, prediction.detach().clone()))

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a method of one object be ``function`` for a while; it gets the method, then the arguments."""
    whole = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: function(whole, *args, **kwargs))
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def record_decoded(vae: nn.Module, decoded: list[Tensor]) -> Iterator[None]:
    """Append the latents of every call of a VAE's ``decode``."""

    def note(whole: Callable[..., Any], latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(latents.detach().clone())
        return whole(latents, *args, **kwargs)

    with replaced(vae, "decode", note):
        yield


@dataclass(frozen=True)
class Sampling:
    """The settings that both sides sample with. more: arguments of the pipeline that the family names."""

    prompt: str
    negative: str
    frames: int
    height: int
    width: int
    more: Callable[[], dict[str, Any]]


@torch.no_grad()
def run_pipeline(
    pipeline: Any,
    settings: Sampling,
    *,
    steps: int,
    guidance: float,
    latents: Tensor | None = None,
    prompt: str | None = None,
    oracle: Callable[..., Any] | None = None,
    size: tuple[int, int] | None = None,
) -> Recording:
    """Sample with a diffusers pipeline and record it.

    latents: the noise, in the network's layout; None: the pipeline draws it. oracle: called in place of the network's
    forward pass, which is its first argument. size: height and width, unless those of the settings.
    """
    record = Recording()

    def keep(_: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        record.latents.append(tensors["latents"].detach().clone())
        return {}

    height, width = size or (settings.height, settings.width)
    with ExitStack() as stack:
        if oracle is not None:
            stack.enter_context(replaced(pipeline.transformer, "forward", oracle))
        stack.enter_context(record_calls(pipeline.transformer, record.calls))
        stack.enter_context(record_decoded(pipeline.vae, record.decoded))
        made = pipeline(
            prompt=settings.prompt if prompt is None else prompt,
            negative_prompt=settings.negative,
            num_frames=settings.frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=None if latents is None else latents.clone(),
            output_type="np",
            callback_on_step_end=keep,
            **settings.more(),
        )
    record.scheduler = copy.deepcopy(pipeline.scheduler)
    record.frames = torch.from_numpy(made.frames[0]) * 255
    return record
