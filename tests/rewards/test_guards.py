"""Guards of online training, on the sprites world's reward."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vpo_engine.data.sprites.damage import KINDS, Clips, damaged, sample_clean
from vpo_engine.data.sprites.world import Attributes
from vpo_engine.rewards.guards import (
    DivergenceAlarm,
    MotionFloor,
    Shuffled,
    WithMotion,
    check_deterministic,
    motion,
    prompt_shuffle,
)
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesReward
from vpo_engine.selection import select_pairs


@pytest.fixture(scope="module")
def reward() -> SpritesReward:
    return SpritesReward()


@pytest.fixture(scope="module")
def clean() -> Clips:
    return sample_clean(24, torch.Generator().manual_seed(3))


def hurt(count: int = 16, **severities: float) -> Clips:
    """Clips of one draw of sprites and motions, with the given severities."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.tensor([severities.get(kind, 0.0) for kind in KINDS]).repeat(count, 1)
    return damaged(Attributes.draw(count, generator), rows, generator)


class _Noisy:
    """The sprites reward with noise in the last bits of one dimension."""

    dimensions = DIMENSIONS

    def __init__(self, reward: SpritesReward) -> None:
        self.reward, self.calls = reward, 0

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        scores = self.reward.score(videos, prompts)
        self.calls += 1
        scores["dynamic_degree"] = scores["dynamic_degree"] + self.calls * 1e-6
        return scores


class TestDeterminism:
    def test_the_sprites_reward_passes(self, reward: SpritesReward, clean: Clips) -> None:
        check_deterministic(reward, clean.videos[0], clean.captions[0])

    def test_noise_in_the_last_bits_is_found(self, reward: SpritesReward, clean: Clips) -> None:
        with pytest.raises(
            ValueError, match=r"dynamic_degree of one clip \('a .*'\) is (\S+), and (\S+) when"
        ) as caught:
            check_deterministic(_Noisy(reward), clean.videos[0], clean.captions[0])
        values = re.findall(r"\d\.\d{4,}", str(caught.value))
        assert len(values) == 2
        assert values[0] != values[1]


class TestPromptShuffle:
    def test_only_text_alignment_reads_the_prompt(self, reward: SpritesReward, clean: Clips) -> None:
        shares = prompt_shuffle(reward, clean.videos, clean.captions)
        assert tuple(shares) == DIMENSIONS
        text = shares.pop("text_alignment")
        assert text.share > 0.95
        assert text.reads(0.01)
        assert set(shares.values()) == {Shuffled(0, 0, 24)}
        assert not any(shuffled.reads() for shuffled in shares.values())

    def test_captions_of_other_clips_say_nothing(self, reward: SpritesReward, clean: Clips) -> None:
        exchanged = clean.captions[1:] + clean.captions[:1]
        text = prompt_shuffle(reward, clean.videos, exchanged)["text_alignment"]
        assert 0.2 < text.share < 0.8
        assert not text.reads()

    def test_same_seed_same_prompts(self, reward: SpritesReward, clean: Clips) -> None:
        one, two = (prompt_shuffle(reward, clean.videos, clean.captions, seed=4) for _ in range(2))
        assert one == two

    def test_two_prompts_are_exchanged_whatever_their_order(
        self, reward: SpritesReward, clean: Clips
    ) -> None:
        other = next(text for text in clean.captions if text != clean.captions[0])
        videos = clean.videos[:1].repeat(3, 1, 1, 1, 1)
        shares = prompt_shuffle(reward, videos, [clean.captions[0], clean.captions[0], other])
        assert shares["text_alignment"] == Shuffled(2, 1, 3)
        assert shares["text_alignment"].share == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("higher", "lower", "probability"),
        [(5, 0, 1 / 32), (4, 0, 1 / 16), (9, 1, 11 / 1024), (0, 0, 1.0), (1, 2, 7 / 8)],
    )
    def test_sign_test(self, higher: int, lower: int, probability: float) -> None:
        """Against the binomial distribution by hand."""
        shuffled = Shuffled(higher, lower, 20)
        assert shuffled.reads(probability * 1.001)
        assert not shuffled.reads(probability)

    def test_one_prompt_cannot_be_exchanged(self, reward: SpritesReward, clean: Clips) -> None:
        with pytest.raises(ValueError, match="1 different prompts, expected at least 2"):
            prompt_shuffle(reward, clean.videos[:2], clean.captions[:1] * 2)


class TestMotion:
    def test_is_the_displacement_in_per_cent_of_the_shorter_side(self) -> None:
        """A texture that is moved by whole pixels, 64 of them to the shorter side; once to and fro."""
        generator = torch.Generator().manual_seed(2)
        texture = torch.rand(1, 3, 16, 24, generator=generator)
        picture = torch.nn.functional.interpolate(texture, scale_factor=4, mode="bicubic").clamp(0, 1)[0]
        frames = (255 * picture).permute(1, 2, 0).to(torch.uint8)
        videos = torch.stack(
            [
                torch.stack([frames.roll(shift, 1) for shift in shifts])
                for shifts in ((0, 0, 0), (0, 2, 4), (0, 2, 0))
            ]
        )
        found = motion(videos)
        assert found[0] < 0.01
        assert found[1:].tolist() == pytest.approx([100 * 2 / 64] * 2, rel=0.15)

    def test_damage_of_a_still_is_little_motion(self) -> None:
        moving, flickering = motion(hurt(8).videos), motion(hurt(8, freeze=1.0, flicker=1.0).videos)
        assert flickering.max() < 0.5 * moving.min()

    @pytest.mark.parametrize(
        "videos",
        [torch.zeros(2, 1, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, 3)],
        ids=["one frame", "floats"],
    )
    def test_what_has_no_motion(self, videos: Tensor) -> None:
        with pytest.raises(
            ValueError, match=re.escape(f"videos are {videos.dtype} {tuple(videos.shape)}, expected")
        ):
            motion(videos)

    def test_the_floor_tells_still_from_moving_candidates(self, reward: SpritesReward) -> None:
        """Though the reward prefers some of the still ones."""
        moving, still = hurt(), hurt(freeze=1.0)
        scorer = WithMotion(reward)
        assert scorer.dimensions == (*DIMENSIONS, "motion")
        sides = [scorer.score(clips.videos, clips.captions) for clips in (moving, still)]
        both = {name: torch.stack([side[name] for side in sides], dim=1) for name in scorer.dimensions}
        excluded = MotionFloor(0.5).still(both)  # [P, 2]
        assert excluded.shape == (16, 2)
        assert not bool(excluded[:, 0].any())
        assert bool(excluded[:, 1].all())
        consistency = both["temporal_consistency"]
        assert bool((consistency[:, 1] > consistency[:, 0]).any())
        lowered = MotionFloor(0.5).lower(consistency, both)
        assert torch.equal(lowered[:, 0], consistency[:, 0])
        assert torch.equal(lowered[:, 1], consistency.amin(1))

    def test_a_video_that_moves_just_as_much_as_the_floor_asks_for_may_win(self) -> None:
        """So with a floor of 0 every video may."""
        for floor in (0.0, 0.5):
            moved = torch.tensor([[floor - 0.01, floor, floor + 0.01]])
            assert MotionFloor(floor).still({"motion": moved}).tolist() == [[True, False, False]]


class TestBarredCandidates:
    """In 200 groups of drawn scores, whatever the rule."""

    scores = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    parts = torch.randn(3, 200, 4, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    barred = torch.rand(200, 4, generator=torch.Generator().manual_seed(2)) < 0.4

    @pytest.mark.parametrize("pareto", [False, True])
    def test_never_win_and_change_nothing_where_there_are_none(self, pareto: bool) -> None:
        scores = self.parts.mean(0) if pareto else self.scores
        parts = self.parts if pareto else None
        free = select_pairs(scores, 0.1, parts)
        pairs = select_pairs(scores, 0.1, parts, self.barred)
        rows = torch.arange(200)
        assert not bool(self.barred[rows, pairs.winner][~pairs.tied].any())
        assert bool((pairs.gap[~pairs.tied] > 0.1).all())
        none = ~self.barred.any(1)
        assert int(none.sum()) > 10
        for name in ("winner", "loser", "gap", "tied"):
            assert torch.equal(getattr(pairs, name)[none], getattr(free, name)[none])
        assert bool(pairs.tied[self.barred.all(1)].all())
        assert 0 < int((~pairs.tied).sum()) < int((~free.tied).sum())

    def test_may_lose_and_leave_the_loser_what_it_was(self) -> None:
        pairs = select_pairs(self.scores, 0.0, None, self.barred)
        assert torch.equal(pairs.loser, self.scores.argmin(1))
        lost = self.barred[torch.arange(200), pairs.loser] & ~pairs.tied
        assert bool(lost.any())

    def test_a_group_whose_only_free_candidate_is_the_worst_is_a_tie(self) -> None:
        pairs = select_pairs(torch.tensor([[3.0, 1.0, 2.0]]), 0.0, None, torch.tensor([[True, False, True]]))
        assert pairs.tied.tolist() == [True]


class TestDivergence:
    @staticmethod
    def observe(alarm: DivergenceAlarm, training: Sequence[float], held_out: Sequence[float]) -> list[str]:
        answers = [
            alarm(10 * index, *values)
            for index, values in enumerate(zip(training, held_out, strict=True), start=1)
        ]
        return [answer for answer in answers if answer is not None]

    def test_more_motion_bought_with_blur(self, reward: SpritesReward) -> None:
        """The training reward is motion; what it does not see, sharpness, falls."""
        shares = [index / 9 for index in range(10)]
        scores = [
            reward.score(clips.videos, clips.captions)
            for clips in (hurt(freeze=0.9 * (1 - share), blur=0.9 * share) for share in shares)
        ]
        training = [float(score["dynamic_degree"].mean()) for score in scores]
        held_out = [float(score["visual_quality"].mean()) for score in scores]
        said = self.observe(DivergenceAlarm(window=6), training, held_out)
        assert len(said) == 1  # of the five windows that show it
        assert re.search(
            r"from step 10 to 60 the training reward rose from \S+ to \S+ while the held-out reward fell",
            said[0],
        )
        assert self.observe(DivergenceAlarm(window=6), held_out, held_out) == []
        assert self.observe(DivergenceAlarm(window=6), training, training) == []

    def test_noise_is_no_trend(self) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(200, 2, 8, generator=generator).tolist()
        raised = sum(bool(self.observe(DivergenceAlarm(), *rows)) for rows in noise)
        assert raised <= 4  # both trends beyond two standard errors, in opposite directions: about 0.2 %

    def test_straight_lines_and_constants(self) -> None:
        line = [float(index) for index in range(4)]
        assert len(self.observe(DivergenceAlarm(window=4), line, line[::-1])) == 1
        assert self.observe(DivergenceAlarm(window=4), [0.1] * 4, line[::-1]) == []
        assert self.observe(DivergenceAlarm(window=4), line, [0.1] * 4) == []

    def test_a_fall_is_measured_along_its_line(self) -> None:
        line = [float(index) for index in range(4)]  # from first to last it falls by 3
        for least, raised in ((2.99, 1), (3.01, 0)):
            alarm = DivergenceAlarm(window=4)
            said = [alarm(index, value, -value, least) for index, value in enumerate(line)]
            assert len([text for text in said if text]) == raised

    def test_a_window_shows_a_trend(self) -> None:
        with pytest.raises(ValueError, match="window is 3, expected at least 4"):
            DivergenceAlarm(window=3)

    def test_rewards_are_finite(self) -> None:
        with pytest.raises(ValueError, match="the held_out reward is nan after step 7"):
            DivergenceAlarm()(7, 1.0, float("nan"))


def test_the_sign_test_holds_for_thousands_of_clips() -> None:
    """Their number of outcomes is larger than any float."""
    assert Shuffled(1100, 100, 1200).reads()
    assert not Shuffled(600, 600, 1200).reads()
