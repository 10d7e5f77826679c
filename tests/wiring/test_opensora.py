"""Open-Sora's own rules in the sprites world: time in bfloat16, guidance, the target, the empty caption."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vpo_engine.build import build_model
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.protocols import SamplerSettings

PROMPTS = ("a red circle moving left", "a yellow triangle moving up")


@functools.cache
def model_in(dtype: str) -> OpenSora:
    config = load_config(None, [f"model.dtype={dtype}"])
    model = build_model(config, Processes.start("cpu"), lambda *_: None)
    model.prepare(PROMPTS)
    return model


class Noting:
    """A network that notes its arguments; its prediction is a plain function of the caption's place in the batch."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        self.calls.append(((x, *args), named))
        values = torch.arange(1.0, len(x) + 1).view(-1, *[1] * (x.dim() - 1))
        return values.expand(len(x), 2 * x.shape[1], *x.shape[2:])


def asked(model: OpenSora, network: Callable[..., Tensor], guidance: float, times: Tensor) -> Tensor:
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(network, latents, times, model.embed(PROMPTS), guidance)


def test_guidance_goes_from_the_empty_caption_to_the_prompt() -> None:
    """The network's rows are the two prompts, then the two empty captions: predictions 1, 2 and 3, 4."""
    model, network = model_in("float32"), Noting()
    times = torch.tensor([300.0, 700.0])
    out = asked(model, network, 2.5, times)
    (x, t, captions, *_), _ = network.calls[0]
    text = model.embed(PROMPTS)
    assert torch.equal(captions[:2, 0], text.embeddings)
    length = text.embeddings.shape[1]
    null = model.network.y_embedder.y_embedding[:length]
    assert torch.equal(captions[2:, 0], null.expand(2, -1, -1).to(captions.dtype))
    assert torch.equal(x[:2], x[2:])
    assert torch.equal(t, torch.cat([times, times]))
    assert out[:, 0, 0, 0, 0].tolist() == pytest.approx([3 + 2.5 * (1 - 3), 4 + 2.5 * (2 - 4)])


def test_policy_and_reference_are_asked_at_the_same_rounded_time() -> None:
    """In bfloat16 t is rounded for whoever predicts, in training as in sampling."""
    model = model_in("bfloat16")
    times = torch.tensor([301.3, 700.9])
    seen = []
    network = model.network
    handle = network.register_forward_pre_hook(lambda _, args: seen.append(args[1].detach().clone()))
    try:
        asked(model, network, 1.0, times)
    finally:
        handle.remove()
    other = Noting()
    asked(model, other, 1.0, times)
    rounded = times.bfloat16().float()
    assert not torch.equal(rounded, times)
    assert torch.equal(seen[0], rounded)
    assert torch.equal(other.calls[0][0][1], rounded)
    sampler = Noting()
    noise = torch.zeros(2, *model.latent_shape)
    model.denoise(sampler, model.start(noise), model.embed(PROMPTS), SamplerSettings(3))
    asked_at = [call[0][1] for call in sampler.calls]
    assert all(torch.equal(t, t.bfloat16().float()) for t in asked_at)


def test_a_sampling_step_follows_the_velocity_towards_the_clean_latents() -> None:
    """With the true velocity one step, or several, lead from any noise to the latents: signs and lengths fit."""
    model = model_in("float32")
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    a, b = model.target_scales(torch.tensor([500.0]))

    def true(x: Tensor, *args: Any, **named: Any) -> Tensor:
        return torch.cat([a * latents + b * noise, torch.zeros_like(latents)], dim=1)

    text = model.embed(PROMPTS[:1])
    for steps in (1, 4):
        found = model.denoise(true, model.start(noise), text, SamplerSettings(steps))
        torch.testing.assert_close(found.latents, latents, rtol=1e-4, atol=1e-4)
    half = model.denoise(true, model.start(noise), text, SamplerSettings(4), stop=2)
    torch.testing.assert_close(half.preview, latents, rtol=1e-4, atol=1e-4)
    t = torch.tensor([400.0])
    kept, added = model.noising_scales(t)
    torch.testing.assert_close(model.add_noise(latents, noise, t), 0.6 * latents + 0.4 * noise)
    assert (float(kept), float(added)) == (pytest.approx(0.6), pytest.approx(0.4))
