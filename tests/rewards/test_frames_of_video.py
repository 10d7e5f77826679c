"""Image scorers on videos: which frames, in which batches, and InstructVideo's segments against its code."""

import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpo_engine.rewards.frames import (
    VideoOfFrames,
    check_finite,
    check_images,
    check_prompts,
    segment_frames,
    segment_weights,
    spread_frames,
)

DATA = Path(__file__).parents[1] / "data" / "rewards" / "instructvideo_weighting"
CASES = list(enumerate(json.loads((DATA / "meta.json").read_text())["cases"]))
IO = load_file(DATA / "io.safetensors")


class Brightness:
    """The mean level of the first channel, over 255, times the prompt's length; remembers what it was called with."""

    dimensions = ("brightness",)

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)
        self.batches: list[list[str]] = []

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert images.dtype == torch.uint8
        return self.score_image_pixels(images.permute(0, 3, 1, 2) / 255, prompts)

    def score_image_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(list(prompts))
        return images[:, 0].mean((1, 2)) * torch.tensor([float(len(prompt)) for prompt in prompts])


class Given(Brightness):
    """The value of the first pixel, to give scores through."""

    def score_image_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0, 0, 0]


def clips(count: int = 3, frames: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, frames, 4, 5, 3), generator=generator, dtype=torch.uint8)


def levels(videos: Tensor) -> Tensor:
    """Return Brightness's score of every frame under a prompt of one letter, [B, F]."""
    return videos[..., 0].float().mean((2, 3)) / 255


@pytest.mark.parametrize(("reduce", "dim"), [("mean", torch.mean), ("min", torch.amin)])
def test_mean_and_min_over_all_frames(reduce: str, dim: object) -> None:
    videos = clips()
    scores = VideoOfFrames(Brightness(), reduce=reduce).score(videos, ["a", "bb", "a"])
    assert list(scores) == ["brightness"]
    expected = dim(levels(videos), dim=1) * torch.tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(scores["brightness"], expected)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_batches_hold_frames_of_several_videos(batch_size: int) -> None:
    scorer = Brightness()
    videos, prompts = clips(), ["a", "bb", "ccc"]
    scores = VideoOfFrames(scorer, batch_size=batch_size).score(videos, prompts)["brightness"]
    torch.testing.assert_close(scores, levels(videos).mean(1) * torch.tensor([1.0, 2.0, 3.0]))
    assert list(chain.from_iterable(scorer.batches)) == [prompt for prompt in prompts for _ in range(6)]
    assert max(map(len, scorer.batches)) <= batch_size


@pytest.mark.parametrize(
    ("num_frames", "count", "expected"),
    [(6, None, [0, 1, 2, 3, 4, 5]), (6, 1, [3]), (51, 3, [8, 25, 42]), (4, 9, [0, 1, 2, 3]), (4, 2, [1, 3])],
)
def test_frames_are_spread(num_frames: int, count: int | None, expected: list[int]) -> None:
    assert spread_frames(num_frames, count) == expected
    videos = clips(2, num_frames)
    scores = VideoOfFrames(Brightness(), frames=count).score(videos, ["a", "a"])["brightness"]
    torch.testing.assert_close(scores, levels(videos)[:, expected].mean(1))


class TestSegments:
    @pytest.mark.parametrize(("index", "case"), CASES)
    def test_weights_and_rewards_are_the_public_codes(self, index: int, case: dict) -> None:
        decay = case["lambda_TAR"] if case["exponential"] else 0.0
        chosen = IO[f"c{index}.global_index"]
        weights = segment_weights(chosen, case["frames"], decay)
        torch.testing.assert_close(weights, IO[f"c{index}.coef"], rtol=1e-6, atol=0)
        reward = (IO[f"c{index}.frame_scores"].gather(1, chosen) * weights).mean(1)
        torch.testing.assert_close(reward, IO[f"c{index}.reward_per_video"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close((1 - reward).mean(0, keepdim=True), IO[f"c{index}.loss"])

    @pytest.mark.parametrize(("index", "case"), CASES)
    def test_videos_with_the_public_codes_frames(
        self, index: int, case: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole way from frame scores to the reward, with the frames that the public code drew."""
        scores, chosen = IO[f"c{index}.frame_scores"], iter(IO[f"c{index}.global_index"])
        monkeypatch.setattr("vpo_engine.rewards.frames.segment_frames", lambda *_: next(chosen))
        decay = case["lambda_TAR"] if case["exponential"] else 0.0
        reward = VideoOfFrames(Given(), reduce="segments", segments=case["segments"], decay=decay)
        videos = scores[..., None, None, None].expand(-1, -1, 3, 2, 2)
        found = reward.score_pixels(videos, ["a", "b"])["brightness"]
        torch.testing.assert_close(found, IO[f"c{index}.reward_per_video"], rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize(("index", "case"), CASES)
    def test_the_public_codes_frames_are_among_ours(self, index: int, case: dict) -> None:
        """Every frame it drew lies in its segment, and a generator reaches all of a segment and nothing else."""
        frames, segments = case["frames"], case["segments"]
        span = frames // segments
        starts = span * torch.arange(segments)
        assert ((IO[f"c{index}.global_index"] - starts) // span == 0).all()
        generator = torch.Generator().manual_seed(0)
        drawn = torch.stack([segment_frames(frames, segments, generator) for _ in range(300)]) - starts
        assert drawn.dtype == torch.int64
        assert all(set(drawn[:, segment].tolist()) == set(range(span)) for segment in range(segments))

    def test_score_takes_the_middle_frames(self) -> None:
        videos = clips(2, 11)
        reward = VideoOfFrames(Brightness(), reduce="segments", segments=3, decay=0.5)
        weights = torch.exp(-0.5 * torch.tensor([4.0, 1.0, 2.0]))
        expected = (levels(videos)[:, [1, 4, 7]] * weights).mean(1)
        for _ in range(2):
            torch.testing.assert_close(reward.score(videos, ["a", "a"])["brightness"], expected)

    def test_decay_is_instructvideos_at_its_own_sizes_and_scales_with_the_segment(self) -> None:
        """16 frames in 4 segments: lambda 1, of the public code; 48 frames: the same weights at a third of it."""
        at_16 = VideoOfFrames(Given(), reduce="segments")
        videos = torch.rand(2, 16, 1, 1, 1).expand(-1, -1, 3, 2, 2)
        by_one = VideoOfFrames(Given(), reduce="segments", decay=1.0).score_pixels(videos, ["a", "b"])
        assert torch.equal(at_16.score_pixels(videos, ["a", "b"])["brightness"], by_one["brightness"])
        longer = videos.repeat_interleave(3, dim=1)
        by_third = VideoOfFrames(Given(), reduce="segments", decay=1 / 3).score_pixels(longer, ["a", "b"])
        torch.testing.assert_close(at_16.score_pixels(longer, ["a", "b"]), by_third)

    def test_every_video_has_its_own_draw(self) -> None:
        videos = torch.arange(400.0).view(1, 400, 1, 1, 1).expand(3, 400, 3, 2, 2)
        reward = VideoOfFrames(Given(), reduce="segments", segments=1, decay=0.0)
        generator = torch.Generator().manual_seed(1)
        first, second = (reward.score_pixels(videos, ["a"] * 3, generator)["brightness"] for _ in range(2))
        assert len({*first.tolist(), *second.tolist()}) == 6

    def test_too_few_frames(self) -> None:
        with pytest.raises(ValueError, match="3 frames for 4 segments; set segments to at most 3"):
            VideoOfFrames(Brightness(), reduce="segments").score(clips(frames=3), ["a"] * 3)

    def test_too_few_frames_are_told_beforehand(self) -> None:
        reward = VideoOfFrames(Brightness(), reduce="segments")
        assert "3 frames for 4 segments" in str(reward.refuse_size(3, 4, 5))
        assert reward.refuse_size(4, 4, 5) is None
        assert VideoOfFrames(Brightness()).refuse_size(3, 4, 5) is None


def test_gradients_reach_the_frames_that_are_scored() -> None:
    videos = (clips().permute(0, 1, 4, 2, 3) / 255).requires_grad_()
    scores = VideoOfFrames(Brightness(), frames=2, batch_size=3).score_pixels(videos, ["a"] * 3)
    torch.testing.assert_close(scores["brightness"], levels(clips())[:, [1, 4]].mean(1))
    scores["brightness"].sum().backward()
    touched = videos.grad.abs().sum((2, 3, 4)) > 0
    assert touched.tolist() == [[False, True, False, False, True, False]] * 3


def test_score_and_pixels_agree_and_share_the_scorers_weights() -> None:
    scorer, videos = Brightness(), clips()
    reward = VideoOfFrames(scorer, reduce="min")
    pixels = reward.score_pixels(videos.permute(0, 1, 4, 2, 3) / 255, ["a"] * 3)
    torch.testing.assert_close(pixels, reward.score(videos, ["a"] * 3))
    assert reward.network is scorer.network


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"frames": 0}, "frames is 0, expected at least 1"),
            ({"segments": 0}, "segments is 0, expected at least 1"),
            ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
            ({"reduce": "max"}, "reduce is 'max', expected one of mean, min, segments"),
            ({"reduce": "segments", "frames": 3}, "set segments instead"),
            ({"decay": -1.0}, "decay is -1.0, expected"),
            ({"decay": float("nan")}, "decay is nan, expected"),
        ],
    )
    def test_settings(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoOfFrames(Brightness(), **settings)

    def test_a_scorer_of_several_dimensions(self) -> None:
        scorer = Brightness()
        scorer.dimensions = ("a", "b")
        with pytest.raises(ValueError, match=r"Brightness has dimensions \('a', 'b'\), expected exactly one"):
            VideoOfFrames(scorer)

    def test_a_scorer_without_gradients(self) -> None:
        scorer = Brightness()
        scorer.score_image_pixels = None
        with pytest.raises(ValueError, match="Brightness passes no gradients to pixels"):
            VideoOfFrames(scorer).score_pixels(torch.zeros(1, 2, 3, 4, 4), ["a"])

    @pytest.mark.parametrize(
        ("videos", "message"),
        [
            (torch.zeros(1, 4, 2, 2, 3), "videos are torch.float32, expected torch.uint8"),
            (torch.zeros(1, 0, 2, 2, 3, dtype=torch.uint8), "videos have shape (1, 0, 2, 2, 3), expected"),
            (torch.zeros(1, 3, 4, 2, 2, dtype=torch.uint8), "expected [B, F, H, W, 3]"),
            (torch.zeros(4, 2, 2, 3, dtype=torch.uint8), "different sizes go in separate calls"),
            (torch.zeros(2, 4, 2, 2, 3, dtype=torch.uint8), "1 prompts for 2 videos"),
        ],
    )
    def test_videos(self, videos: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoOfFrames(Brightness()).score(videos, ["a"])

    @pytest.mark.parametrize(
        ("videos", "message"),
        [
            (
                torch.zeros(1, 4, 3, 2, 2, dtype=torch.uint8),
                "videos are torch.uint8, expected floats in 0..1",
            ),
            (torch.zeros(1, 4, 2, 2, 3), "videos have shape (1, 4, 2, 2, 3), expected [B, F, 3, H, W]"),
        ],
    )
    def test_video_pixels(self, videos: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoOfFrames(Brightness()).score_pixels(videos, ["a"])

    def test_what_scorers_check(self) -> None:
        with pytest.raises(ValueError, match=r"images have shape \(1, 3, 2, 2\), expected \[B, H, W, 3\]"):
            check_images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["a"])
        with pytest.raises(ValueError, match=r"prompt 1 is ' ', expected text: Model judges by it"):
            check_prompts(["a", " "], "Model")
        with pytest.raises(ValueError, match=r"Model gave nan for input 1 \('b'\)"):
            check_finite(torch.tensor([0.0, float("nan")]), ["a", "b"], "Model")
