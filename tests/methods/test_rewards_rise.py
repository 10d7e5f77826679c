"""Methods that follow the reward's gradient on the sprites world: the reward rises as its gradient says it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_of_reward import check_gradient
from small_policy import shipped_policy_is_small

from vpo_engine.build import build_model, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.assets import Sprites
from vpo_engine.distributed.processes import Processes
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
    name = case.partition(",")[0]
    check_gradient([f"method={name}", *CASES[case]], ["a red circle moving left", "a blue square moving up"])


def test_the_world_draws_another_clip_at_every_place_of_the_stream() -> None:
    caption = "a red circle moving left"
    first, again, other = (
        Sprites.real_video(caption, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (17, 32, 32, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("method", "name", "count"),
    [("vader", "frames", 1), ("instructvideo", "segments", 4), ("t2v_turbo", "frames", 5)],
)
def test_a_reward_of_single_frames_sees_as_many_as_published(method: Any, name: str, count: int) -> None:
    config = load_config(None, [f"method={method}", "reward.kind=sprites_image", "reward.dimensions=image"])
    processes = Processes.start("cpu")
    with shipped_policy_is_small():
        model = build_model(config, processes, lambda line: None)
    reward = build_reward(config, processes.device)
    found: Any = method_class(method)(config, model, reward, None, processes)
    assert getattr(found, name) == count
