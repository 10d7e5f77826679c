"""Methods that follow the reward's gradient on the sprites world: the reward rises as its gradient says it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vpo_engine.build import build_model, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.assets import Sprites
from vpo_engine.distributed.processes import Processes
from vpo_engine.method import embed_prompts
from vpo_engine.methods import method_class

CASES = {
    "vader": ("vader.steps=3", "vader.last_steps=3", "vader.guidance=2"),
    "vader, a random frame": (
        "vader.steps=2",
        "vader.last_steps=2",
        "reward.kind=sprites_image",
        "reward.dimensions=image",
    ),
    "instructvideo": ("instructvideo.steps=4", "instructvideo.strength=0.25"),
    "instructvideo, segments": (
        "instructvideo.steps=4",
        "instructvideo.strength=0.25",
        "reward.kind=sprites_image",
        "reward.dimensions=image",
    ),
}
"""In each of them every step of the sampling has a gradient, so that it is the whole gradient of the loss."""


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_small_step_along_the_gradient_lowers_the_loss_by_what_it_promises(case: str) -> None:
    """The same prompts, noise and frames, after weights moved by eps * gradient to either side: half the difference is
    eps * |gradient|^2 up to the third order. It is 3e-4 of the loss, of which float32 knows 1e-7.
    """
    name = case.partition(",")[0]
    config = load_config(None, [f"method={name}", "pairs_per_step=2", "steps=1", *CASES[case]])
    processes = Processes.start("cpu")
    model: Any = build_model(config, processes, lambda line: None)
    reward: Any = build_reward(config, processes.device)
    cls = method_class(config.method)
    stream, _ = cls.open_stream(config, ["a red circle moving left", "a blue square moving up"])
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
    eps, losses = 3e-4 * abs(before.item()) / squared, []
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


def test_the_world_draws_another_clip_at_every_place_of_the_stream() -> None:
    caption = "a red circle moving left"
    first, again, other = (
        Sprites.real_video(caption, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (17, 32, 32, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
