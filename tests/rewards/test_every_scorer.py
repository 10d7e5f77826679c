"""Test what holds for every scorer with published weights, on its tiny checkpoint: its scores, and what it loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import test_hpsv2
import test_imagereward
import test_laion_aesthetic
import test_mps
import test_q_align
import test_viclip
import test_videoscore
import test_vjepa
import torch
from safetensors.torch import load_file
from tiny_scorers import IMAGES, PUBLISHED, make
from tiny_videos import noise, pixels, stacked
from torch import Tensor

from vpo_engine.metrics.registry import metric_card
from vpo_engine.metrics.rewards import _hashes
from vpo_engine.rewards.registry import build_reward, reward_card

ATOL = {
    "videoscore": 1e-5,
    "videoalign": 1e-5,
    "q_align": 5e-6,
    "viclip": 1e-6,
    "vjepa": 1e-6,
    "laion_aesthetic": 1e-5,
    "imagereward": 1e-6,
    "mps": 1e-4,
    "hpsv2": 1e-6,
    "pickscore": 1e-4,
}
"""By how much scores move with the batch: rounding, of values from 0.04 to 38. It differs between processors. mps and
pickscore are a hundred times a cosine, of which ten units in the last place are 1e-4."""
PROMPTS = ["w3 a cat", "w7 w9 the red dog", "w20"]
"""Different texts to every tiny tokenizer."""


@pytest.fixture(scope="module", params=ATOL)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, make(request.param, tmp_path_factory.mktemp("scorer") / "tiny")


def test_every_differentiable_scorer_is_here() -> None:
    assert set(ATOL) == {name for name in PUBLISHED if reward_card(name).differentiable}


class TestScores:
    def test_are_as_the_card_says(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        scores, ranges = made.score(noise(3, 17, 24, 30, 3), PROMPTS), reward_card(name).dimensions
        assert tuple(scores) == made.dimensions == tuple(ranges)
        for dimension, (low, high) in ranges.items():
            values = scores[dimension]
            assert values.shape == (3,)
            assert values.dtype == torch.float32
            assert values.unique().numel() == 3
            assert low is None or bool((values >= low).all())
            assert high is None or bool((values <= high).all())

    def test_are_deterministic_and_leave_no_trace(self, scorer: tuple[str, Any]) -> None:
        videos, before = noise(2, 17, 24, 30, 3), torch.get_rng_state()
        kept = videos.clone()
        first, second = (stacked(scorer[1].score(videos, PROMPTS[:2])) for _ in range(2))
        assert torch.equal(first, second)
        assert not first.requires_grad
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(videos, kept)

    def test_do_not_depend_on_the_batch(
        self, scorer: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, made = scorer
        videos = noise(3, 17, 24, 30, 3)
        together = stacked(made.score(videos, PROMPTS))
        alone = [stacked(made.score(videos[i : i + 1], PROMPTS[i : i + 1])) for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=ATOL[name])
        monkeypatch.setattr(made, "batch_size", 2)
        torch.testing.assert_close(stacked(made.score(videos, PROMPTS)), together, rtol=0, atol=ATOL[name])

    def test_of_pixels_do_not_depend_on_the_batch(
        self, scorer: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, made = scorer
        videos = pixels(noise(3, 17, 24, 30, 3))
        alone = [stacked(made.score_pixels(videos[i : i + 1], PROMPTS[i : i + 1])) for i in range(3)]
        monkeypatch.setattr(made, "batch_size", 2)
        found = stacked(made.score_pixels(videos, PROMPTS))
        torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=ATOL[name])


@pytest.mark.parametrize("scorer", IMAGES, indirect=True)
class TestScoresOfImages:
    def test_score_images(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer[0], scorer[1].scorer
        images, before = noise(3, 30, 44, 3), torch.get_rng_state()
        kept = images.clone()
        scores = made.score_images(images, PROMPTS)
        assert scores.shape == (3,)
        assert scores.dtype == torch.float32
        assert scores.unique().numel() == 3
        assert not scores.requires_grad
        assert torch.equal(scores, made.score_images(images, PROMPTS))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(images, kept)
        alone = [made.score_images(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(scores, torch.cat(alone), rtol=0, atol=ATOL[name])
        prepared = made.preprocess(images)
        assert prepared.shape == (3, 3, 28, 28)
        torch.testing.assert_close(made.scores(prepared, PROMPTS), scores, rtol=0, atol=ATOL[name])


@pytest.mark.parametrize(
    ("scorer", "atol", "spread"),
    [("laion_aesthetic", 0.02, 0.03), ("imagereward", 1e-3, 5e-3), ("pickscore", 0.2, 1)],
    indirect=["scorer"],
)
def test_cropped_pixels_score_nearly_like_bytes_and_take_gradients(
    scorer: tuple[str, Any], atol: float, spread: float
) -> None:
    made, images = scorer[1].scorer, noise(2, 30, 44, 3)
    inputs = pixels(images).requires_grad_()
    found, expected = made.score_image_pixels(inputs, PROMPTS[:2]), made.score_images(images, PROMPTS[:2])
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=atol)
    assert (expected[0] - expected[1]).abs() > spread
    found.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad[..., 8:-8].abs().amin((0, 1)).min() > 0


STORED = {
    "videoscore": test_videoscore.TINY,
    "q_align": test_q_align.TINY,
    "viclip": test_viclip.DATA,
    "vjepa": test_vjepa.DATA,
    "laion_aesthetic": test_laion_aesthetic.TINY,
    "imagereward": test_imagereward.TINY,
    "mps": test_mps.DATA,
    "hpsv2": test_hpsv2.TINY,
}
"""Folders with the weights under the published names, but for those of adapters and of transformers' own models."""
UNUSED = {
    "imagereward": r"blip\.text_encoder\.embeddings\.position_ids|blip\.(text|vision)_proj\.(weight|bias)",
    "mps": r".*\.rotary_emb\.inv_freq",
}
"""What the published files hold besides."""


@pytest.mark.parametrize("scorer", STORED, indirect=True)
def test_weights_keep_the_published_names(scorer: tuple[str, Any]) -> None:
    name, made = scorer
    published = load_file(STORED[name] / "weights.safetensors")
    used = {key for key in published if not re.fullmatch(UNUSED.get(name, ""), key)}
    state = made.network.state_dict()
    assert state.keys() == used
    assert used < published.keys() if name in UNUSED else used == published.keys()
    assert all(torch.equal(weight, published[key]) for key, weight in state.items())
    assert not any(weight.requires_grad for weight in made.network.parameters())
    assert not made.network.training


WRONG = {
    "viclip": (test_viclip, "text_encoder.positional_embedding", [32, 24]),
    "vjepa": (test_vjepa, "target_encoder.module.backbone.norm.bias", [16]),
    "mps": (test_mps, "model.text_projection.weight", [16, 24]),
}
"""Whose test writes a checkpoint of given weights, and one of them with its shape."""


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_wrong_weights(tmp_path: Path, name: str, fault: str) -> None:
    module, key, shape = WRONG[name]
    weights: dict[str, Tensor] = dict(module.WEIGHTS)
    if fault == "missing":
        del weights[key]
        words = f"missing {key}"
    elif fault == "unexpected":
        weights[f"{key}.more"] = torch.zeros(1, 16)
        words = f"unexpected {key}.more"
    else:
        weights[key] = torch.zeros(3, *shape)
        words = f"{key} is {[3, *shape]}, expected {shape}"
    message = f"is not a checkpoint of {PUBLISHED[name].called}, 1 weights disagree: {words}; "
    with pytest.raises(ValueError, match=re.escape(message)):
        PUBLISHED[name].load(module.write_checkpoint(tmp_path / "wrong", weights))


POSITIVE = {
    "videoscore": (["max_frames", "batch_size"], "at least 1"),
    "videoalign": (["fps", "batch_size"], "a finite number above 0"),
    "q_align": (["fps", "frames", "batch_size"], "a number above 0"),
    "viclip": (["batch_size"], "at least 1"),
    "vjepa": (["batch_size"], "at least 1"),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_numbers_are_positive(tmp_path: Path, name: str) -> None:
    folder, (settings, expected) = PUBLISHED[name].write(tmp_path / "tiny"), POSITIVE[name]
    for setting in settings:
        with pytest.raises(ValueError, match=f"{setting} is 0, expected {expected}"):
            PUBLISHED[name].load(folder, **{setting: 0})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_metric_of_it_tells_its_weights_from_others(tmp_path: Path, name: str) -> None:
    folder = PUBLISHED[name].write(tmp_path / "tiny")
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".tar")
    written = {path.name for path in folder.rglob("*") if path.suffix in kinds}
    found = _hashes(metric_card(f"reward:{name}"), folder)
    assert {Path(file).name for file in found} - {"model_config.json"} == written != set()


@pytest.mark.parametrize("name", [name for name in ATOL if name not in ("videoscore", "videoalign")])
def test_weights_go_to_the_device_that_is_asked_for(tmp_path: Path, name: str) -> None:
    """The other two make tables when they are loaded, which the meta device cannot hold."""
    made = PUBLISHED[name].load(PUBLISHED[name].write(tmp_path / "tiny"), device="meta")
    assert {weight.device.type for weight in made.network.parameters()} == {"meta"}


def test_the_builtin_reward_goes_to_the_device_that_is_asked_for() -> None:
    made: Any = build_reward("builtin", device="meta")
    assert made.device == torch.device("meta")
