"""Rewards of pixels with gradients: the scores of bytes within the rounding, and gradients by finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_scorers import SCORERS, make
from tiny_videos import noise, pixels, stacked
from torch import Tensor

from vpo_engine.data.sprites.damage import damaged, draw_severities
from vpo_engine.data.sprites.world import Attributes, all_captions
from vpo_engine.rewards.builtin import Builtin
from vpo_engine.rewards.clip import CONVENTIONS, ImagePreprocessor
from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.registry import build_reward, reward_card
from vpo_engine.rewards.sprites import SpritesJudge, SpritesReward
from vpo_engine.rewards.sprites_image import SpritesImage
from vpo_engine.rewards.videoscore import FrameProcessor

DIFFERENTIABLE = tuple(name for name in SCORERS if reward_card(name).differentiable)
FIXED_POINT = 0.01
"""PIL's weights have 22 binary digits after the point: 255 * 20 taps * 2^-23 levels, twice, is far below this."""
NAMED = tuple(name for name, convention in CONVENTIONS.items() if convention.pil)


def resize_matrix(given: int, wanted: int, mode: str) -> Tensor:
    """The weights [wanted, given] of a resize along one side, float64."""
    unit = torch.eye(given, dtype=torch.float64)[None, None]
    resized = F.interpolate(unit, (given, wanted), mode=mode, antialias=True, align_corners=False)
    return resized[0, 0].T


def overshoot(levels: Tensor) -> float:
    return float(torch.stack([levels - 255, -levels]).amax().clamp(min=0))


def rounding_bound(image: Tensor, size: tuple[int, int], mode: str) -> float:
    """By how many levels PIL's resize of an image [3, H, W] in 0..255 may differ from exact arithmetic.

    PIL resizes the width, rounds to a byte, which clamps, and then does the same with the height. The first rounding
    errs by half a level and by what it clamps; the second pass makes that larger by the sum of its weights' sizes.
    """
    rows, columns = (resize_matrix(*sides, mode) for sides in zip(image.shape[1:], size, strict=True))
    wide = image.double() @ columns.T
    whole = rows @ wide
    grown = float(rows.abs().sum(1).max()) if size[0] != image.shape[1] else 1.0
    first = 0.5 + overshoot(wide) if size[1] != image.shape[2] else 0.0
    return grown * first + 0.5 + overshoot(whole) + FIXED_POINT


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("size", [(64, 64), (40, 71), (100, 57), (20, 31)])
@pytest.mark.parametrize("smooth", [True, False])
def test_pixels_differ_from_bytes_by_pils_rounding_alone(
    name: str, size: tuple[int, int], smooth: bool
) -> None:
    """A smooth picture does not overshoot: two roundings remain, the first of them times 1.25 at most."""
    preprocess = ImagePreprocessor.named(name, 28)
    image = noise(1, *size, 3)
    if smooth:
        small = F.interpolate(image.movedim(3, 1).float(), (3, 3), mode="area")
        image = F.interpolate(small, size, mode="bilinear").round().to(torch.uint8).movedim(1, 3)
    found, expected = preprocess.pixels(pixels(image)), preprocess(image)
    resized = preprocess._resized(*size)
    bound = rounding_bound(image[0].movedim(2, 0), resized, "bicubic")
    assert not smooth or bound <= 0.5 * 1.3 + 0.5 + FIXED_POINT
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])  # CLIP's
    levels = (found - expected).abs().amax((0, 2, 3)) * deviation * 255
    assert levels.max() <= bound
    if not smooth and size == (20, 31):  # enlarged noise overshoots, which the bound has to know
        assert levels.max() > 2


@pytest.mark.parametrize("size", [(24, 30), (90, 40), (200, 300)])
def test_videoscores_pixels_differ_from_bytes_by_a_level(size: tuple[int, int]) -> None:
    """The weights of a bilinear resize add up to 1 and none is negative: half a level of each pass."""
    processor = FrameProcessor(28, 112)
    frames = noise(2, *size, 3)
    found, expected = processor.pixels(pixels(frames)), processor(frames)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= (1 + FIXED_POINT) * 2 / 255


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_preprocessing_passes_gradcheck(name: str) -> None:
    preprocess = ImagePreprocessor.named(name, 6)
    image = torch.rand(1, 3, 8, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(preprocess.pixels, (image.requires_grad_(),))


# --- the sprites world ---


def clips(count: int) -> tuple[Tensor, list[str]]:
    """Damaged clips of the world, uint8, and their captions."""
    prompts, random = all_captions()[:count], torch.Generator().manual_seed(0)
    return damaged(Attributes.of(prompts), draw_severities(count, random), random).videos, prompts


@pytest.mark.parametrize("scorer", [SpritesReward, SpritesJudge])
def test_sprites_score_pixels_as_bytes(scorer: Any) -> None:
    """Byte / 255 * 255 is the byte up to an ulp, and the networks add float32 rounding."""
    videos, prompts = clips(6)
    found, expected = scorer().score_pixels(pixels(videos), prompts), scorer().score(videos, prompts)
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=0, atol=1e-4)
    assert float(stacked(expected).std(0).max()) > 0.05


def test_sprites_score_single_frames_of_pixels_as_bytes() -> None:
    videos, prompts = clips(6)
    reward = VideoOfFrames(SpritesImage())
    found, expected = reward.score_pixels(pixels(videos), prompts), reward.score(videos, prompts)
    torch.testing.assert_close(found["image"], expected["image"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sprites", "sprites_image"])
def test_enlarged_clips_score_as_the_clips(name: str) -> None:
    videos, prompts = clips(3)
    reward: Any = build_reward(name)
    large = pixels(videos).repeat_interleave(3, 3).repeat_interleave(3, 4)
    found, expected = reward.score_pixels(large, prompts), reward.score_pixels(pixels(videos), prompts)
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scorer", [SpritesReward, SpritesJudge])
def test_the_gradient_of_sprites_scores_is_that_of_finite_differences(scorer: Any) -> None:
    """In float64 along a random direction. A little noise in the pixels leaves no two places equally strong: a maximum
    of equals has a kink."""
    made = scorer()
    made.network = made.network.double()
    videos, prompts = clips(2)
    levels = videos.movedim(4, 2).double()
    levels += torch.rand(levels.shape, generator=torch.Generator().manual_seed(2))
    inputs = (levels / 255).requires_grad_()
    scores = made.score_pixels(inputs, prompts)
    direction = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3)).double()
    for name, values in scores.items():
        (gradient,) = torch.autograd.grad(values.sum(), inputs, retain_graph=True)
        ends = [
            made.score_pixels(inputs.detach() + h * direction, prompts)[name].sum() for h in (1e-7, -1e-7)
        ]
        expected = float(ends[0] - ends[1]) / 2e-7
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_refuses_clips_of_another_size() -> None:
    with pytest.raises(ValueError, match="this reward scores clips of the sprites world only"):
        SpritesReward().score_pixels(torch.zeros(1, 5, 3, 32, 32), all_captions()[:1])


# --- every differentiable reward ---


@pytest.fixture(scope="module", params=DIFFERENTIABLE)
def reward(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(request.param, tmp_path_factory.mktemp("scorer") / "tiny")


def inputs_of(reward: Any) -> tuple[Tensor, list[str]]:
    if isinstance(reward, SpritesReward):
        videos, prompts = clips(2)
        return pixels(videos), prompts
    side = (96, 192) if "naturalness" in reward.dimensions else (24, 30)
    smooth = F.interpolate(pixels(noise(1, 17, 6, 8, 3))[0], side, mode="bilinear")[None]
    return smooth, ["w3 a cat"]


def test_card_and_reward_agree_on_gradients() -> None:
    assert set(DIFFERENTIABLE) >= {
        "sprites",
        "videoscore",
        "laion_aesthetic",
        "imagereward",
        "hpsv2",
        "pickscore",
        "mps",
    }
    assert reward_card("sprites_image").differentiable


def test_the_gradient_points_where_the_score_rises(reward: Any) -> None:
    """A small step along the gradient raises the sum of scores by about its length times the gradient's norm.

    The builtin reward has kinks, as absolute values have; ``test_builtin.py`` looks at its gradients.
    """
    if isinstance(reward, Builtin):
        return
    videos, prompts = inputs_of(reward)
    inputs = videos.clone().requires_grad_()
    scores = reward.score_pixels(inputs, prompts)
    assert tuple(scores) == reward.dimensions
    before = sum(values.sum() for values in scores.values())
    before.backward()
    assert inputs.grad is not None
    norm = float(inputs.grad.norm())
    assert norm > 0
    # a step that changes the scores by a thousandth of themselves, well above float32's rounding
    length = 1e-3 * abs(before.item()) / norm
    moved = [videos + sign * length * inputs.grad / norm for sign in (1, -1)]
    ends = [
        sum(float(values.sum()) for values in reward.score_pixels(each, prompts).values()) for each in moved
    ]
    assert (ends[0] - ends[1]) / (2 * length) == pytest.approx(norm, rel=0.1)


def test_no_gradient_reaches_its_parameters(reward: Any) -> None:
    videos, prompts = inputs_of(reward)
    inputs = videos.clone().requires_grad_()
    sum(values.sum() for values in reward.score_pixels(inputs, prompts).values()).backward()
    network = getattr(reward, "network", None)
    if network is not None:
        assert all(
            parameter.grad is None and not parameter.requires_grad for parameter in network.parameters()
        )


def test_every_chosen_frame_gets_a_gradient(tmp_path: Path) -> None:
    reward = make("videoscore", tmp_path / "tiny")
    videos = pixels(noise(1, 20, 24, 30, 3)).requires_grad_()
    sum(values.sum() for values in reward.score_pixels(videos, ["w3 a cat"]).values()).backward()
    assert videos.grad is not None
    used = videos.grad.abs().amax((0, 2, 3, 4)) > 0
    assert used.nonzero().flatten().tolist() == [int(step * 20 / 16) for step in range(16)]
