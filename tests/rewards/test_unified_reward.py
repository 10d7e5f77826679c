"""UnifiedReward: its questions, the frames it sees, and the reading of its answers."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_qwen import write_judge
from tiny_videos import noise
from torch import Tensor

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.qwen_judge import Clip
from vpo_engine.rewards.unified_reward import (
    CARD,
    CARD_1,
    FORMS,
    QUESTION_1,
    QUESTION_2,
    QUESTION_PAIR,
    UnifiedReward,
    image_indices,
    parse_answer,
    parse_preference,
    parse_scores,
)

DATA = Path(__file__).parents[1] / "data" / "rewards" / "unified_reward"
GOLDEN = json.loads((DATA / "golden.json").read_text())
FIVE, SCORE_ONLY, NOTHING, AXES = (case["text"] for case in GOLDEN["answers"])
CAT = "A cat jumps over a wall"


def clips(count: int, frames: int = 4) -> Tensor:
    return noise(count, frames, 24, 30, 3)


class Shown(UnifiedReward):
    """Answers as told, and keeps what it would have shown to the model."""

    def __init__(self, answer: str, version: int) -> None:
        self.version, self.fps, self.text = version, 24.0, answer  # type: ignore[assignment]
        self.judge = self  # type: ignore[assignment]
        self.asked: list[tuple[list[Clip], str]] = []

    def answer(self, clips: list[Clip], question: str, prompt: str) -> "Shown":
        assert prompt in question
        self.asked.append((clips, question))
        return self


class TestReading:
    @pytest.mark.parametrize("case", GOLDEN["answers"], ids=lambda case: case["text"][:12])
    def test_answers(self, case: dict) -> None:
        assert parse_answer(case["text"]) == case["parsed"]

    @pytest.mark.parametrize("case", GOLDEN["pairwise"], ids=lambda case: case["text"])
    def test_preferences(self, case: dict) -> None:
        assert parse_preference(case["text"]) == case["preferred"]

    @pytest.mark.parametrize(
        ("text", "count"),
        [("", "no"), ("Video 3 is better", "no"), ("Video 1 is better. Video 2 is better.", "2")],
    )
    def test_no_preference(self, text: str, count: str) -> None:
        with pytest.raises(ValueError, match=f"holds {count} verdicts, expected one: .*; the pair gets none"):
            parse_preference(text)

    def test_scores(self) -> None:
        assert tuple(parse_scores(FIVE, 1).values()) == (4, 4, 3, 1, 2, 6)
        assert tuple(parse_scores(FIVE, 1)) == FORMS[1].dimensions == tuple(CARD_1.dimensions)
        assert tuple(parse_scores(AXES, 2).values()) == (2.4036, 3.0987, 3.3889)
        assert tuple(parse_scores(AXES, 2)) == FORMS[2].dimensions == tuple(CARD.dimensions)
        assert parse_scores(f"Reasons: many\n{AXES.lower()}\nDone.", 2) == parse_scores(AXES, 2)

    @pytest.mark.parametrize(
        ("text", "version", "message"),
        [
            (
                SCORE_ONLY,
                1,
                "holds no temporal_consistency, dynamic_degree, text_alignment, factual_consistency",
            ),
            (NOTHING, 1, "holds no visual_quality, temporal_consistency"),
            (AXES, 1, "Is version 1 the model's?"),
            (FIVE, 2, "Is version 2 the model's?"),
            (
                FIVE.replace("degree: 3", "degree: 5"),
                1,
                "has dynamic degree 5, expected 1 to 4",
            ),
            (FIVE + "\nFinal Score: 60", 1, "has Final Score 60, expected 1 to 10"),
            (
                AXES.replace("3.0987", "0.5"),
                2,
                "has Physics Score (1-5) 0.5, expected 1 to 5",
            ),
            (AXES.replace("3.0987", "nan"), 2, "holds no physical_consistency"),
        ],
    )
    def test_no_scores(self, text: str, version: int, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            parse_scores(text, version)  # type: ignore[arg-type]
        assert "the video gets no score" in str(caught.value)


class TestQuestions:
    @pytest.mark.parametrize(
        ("question", "digest"),
        [
            (QUESTION_1, "28d6c843b5378e18ba81eaa709ccf1b620b419b49b75fc91604de3e78890ae5b"),
            (QUESTION_2, "b3c2e5f60178833afab13538bd1eab164a29733b6d382f6fe6e6b0bfc410d2c7"),
            (QUESTION_PAIR, "f45597c229cfabe3b60501895c3215dbbcc55ab9a1cb8771a1cdca09845c817e"),
        ],
    )
    def test_they_are_the_published_ones(self, question: str, digest: str) -> None:
        """With "$prompt" in the prompt's place."""
        assert hashlib.sha256(question.encode()).hexdigest() == digest

    def test_version_1_sees_a_video(self) -> None:
        shown = Shown(FIVE, 1)
        scores = shown.score(clips(2, frames=68), [CAT, "a dog"])
        assert tuple(scores) == shown.dimensions
        assert scores["final_score"].tolist() == [6, 6]
        assert [question for _, question in shown.asked] == [
            QUESTION_1.replace("$prompt", prompt) for prompt in (CAT, "a dog")
        ]
        ((clip,), _) = shown.asked[0]
        assert clip.frames.shape == (6, 3, *qwen_vl.smart_resize(24, 30, 100352, 602112))
        assert clip.seconds == pytest.approx(2 / (6 / 68 * 24))

    @pytest.mark.parametrize("count", sorted(GOLDEN["frame_indices"], key=int))
    def test_frames_of_version_2(self, count: str) -> None:
        assert image_indices(int(count)) == GOLDEN["frame_indices"][count]

    def test_version_2_sees_single_frames(self) -> None:
        shown = Shown(AXES, 2)
        videos = clips(1, frames=5)
        scores = shown.score(videos, [CAT])
        assert torch.stack(list(scores.values())).flatten().tolist() == pytest.approx(
            [2.4036, 3.0987, 3.3889]
        )
        ((images, question),) = shown.asked
        assert question == QUESTION_2.replace("$prompt", CAT)
        assert image_indices(5) == list(range(5))
        assert [image.seconds for image in images] == [None] * 5
        assert all(image.frames.shape == (1, 3, 56, 84) for image in images)
        expected = qwen_vl.resize_levels(videos[0], (56, 84))
        assert torch.equal(torch.cat([image.frames for image in images]), expected)

    def test_compare(self) -> None:
        shown = Shown("Video 2 is better.", 1)
        assert shown.compare(clips(1), clips(1, frames=30), [CAT]) == [2]
        ((pair, question),) = shown.asked
        assert question == QUESTION_PAIR.replace("$prompt", CAT)
        assert [clip.seconds for clip in pair] == pytest.approx([1 / 12, 2 / (4 / 30 * 24)])


class TestJudge:
    def test_images_through_the_model(self, tmp_path: Path) -> None:
        folder = write_judge(tmp_path / "taught", [AXES])
        scorer = UnifiedReward.from_pretrained(folder, dtype=torch.float32)
        before = torch.get_rng_state()
        scores = scorer.score(clips(2), [CAT, "a dog"])
        assert scores["style"].dtype == torch.float32
        assert scores["style"].tolist() == pytest.approx([3.3889] * 2)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_pair_through_the_model(self, tmp_path: Path) -> None:
        folder = write_judge(tmp_path / "taught", ["Both videos are ", "equally good."])
        scorer = UnifiedReward.from_pretrained(folder, dtype=torch.float32, version=1)
        assert scorer.compare(clips(1), clips(1, frames=6), [CAT]) == [0]
        with pytest.raises(ValueError, match="holds no visual_quality"):
            scorer.score(clips(1), [CAT])

    def test_places_of_images(self, tmp_path: Path) -> None:
        judge = UnifiedReward.from_pretrained(write_judge(tmp_path / "random"), dtype=torch.float32).judge
        inputs = judge._inputs([Clip(torch.zeros(1, 3, 28, 56, dtype=torch.uint8), None)] * 3, "q")
        text = judge.tokenizer.decode(inputs["input_ids"][0].tolist(), skip_special_tokens=False)
        slots = "<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|>"
        assert f"<|im_start|>user\n{slots * 3}q<|im_end|>\n" in text
        assert int((inputs["mm_token_type_ids"] == 1).sum()) == 6
        assert inputs["image_grid_thw"].tolist() == [[1, 2, 4]] * 3

    @pytest.mark.parametrize(
        ("settings", "message"), [({"version": 3}, "version is 3, expected 1 or 2"), ({"fps": 0}, "fps is 0")]
    )
    def test_settings(self, tmp_path: Path, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            UnifiedReward.from_pretrained(write_judge(tmp_path / "random"), **settings)

    def test_missing_file(self, tmp_path: Path) -> None:
        folder = write_judge(tmp_path / "random")
        (folder / "tokenizer.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in .*CodeGoat24/UnifiedReward"):
            UnifiedReward.from_pretrained(folder)


class TestRefusals:
    @pytest.mark.parametrize(
        ("videos", "prompts", "message"),
        [
            (torch.zeros(1, 4, 24, 30, 3), [CAT], "videos are torch.float32, expected torch.uint8"),
            (clips(1)[:, :0], [CAT], "videos have shape (1, 0, 24, 30, 3), expected"),
            (clips(1)[:, :1], [CAT], "videos have 1 frame, expected at least 2"),
            (clips(2), [CAT], "1 prompts for 2 videos"),
            (clips(1), [""], "prompt 0 is '', expected text"),
        ],
    )
    def test_inputs(self, videos: Tensor, prompts: list[str], message: str) -> None:
        shown = Shown(FIVE, 1)
        with pytest.raises(ValueError, match=re.escape(message)):
            shown.score(videos, prompts)
        with pytest.raises(ValueError, match=re.escape(message)):
            shown.compare(videos, videos, prompts)
        assert shown.asked == []
