"""The gradient of a method's loss against the loss itself, where every step of the sampling has a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from vpo_engine.build import build_model, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.method import embed_prompts
from vpo_engine.methods import method_class


def check_gradient(settings: Sequence[str], captions: Sequence[str], share: float = 3e-4) -> None:
    """Assert that a small step along the gradient lowers the loss by what the gradient promises, and freezes the rest.

    The same prompts, noise and frames, after weights moved by eps * gradient to either side: half the difference is
    eps * |gradient|^2 up to the third order. It is ``share`` of the loss, of which float32 knows 1e-7.
    """
    config = load_config(None, ["pairs_per_step=2", "steps=1", *settings])
    processes = Processes.start("cpu")
    model: Any = build_model(config, processes, lambda line: None)
    reward: Any = build_reward(config, processes.device)
    cls = method_class(config.method)
    stream, _ = cls.open_stream(config, list(captions))
    method: Any = cls(config, model, reward, None, processes, None, stream)
    texts = [item.text for item in stream.take(0, 2)]
    model.prepare(texts)
    prompts = embed_prompts(model, texts, range(2))

    before, scores = method.learn_from(prompts)
    before.backward()
    assert all(values.shape == (2,) for values in scores.values())
    weights = [weight for weight in model.network.parameters() if weight.grad is not None]
    squared = sum(float(weight.grad.square().sum()) for weight in weights)
    assert squared > 0
    eps, losses = share * abs(before.item()) / squared, []
    for change in (-eps, 2 * eps):
        with torch.no_grad():
            for weight in weights:
                weight += change * weight.grad
            losses.append(method.learn_from(prompts)[0].item())
    assert losses[0] < before.item() < losses[1]
    assert (losses[1] - losses[0]) / 2 == pytest.approx(eps * squared, rel=0.1)

    frozen = [*model.parts["vae"].parameters(), *reward.network.parameters()]
    assert frozen
    assert all(weight.grad is None and not weight.requires_grad for weight in frozen)
