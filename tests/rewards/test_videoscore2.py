"""VideoScore2's reading of answers against the authors' code, and the judge behind it on tiny weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen import JUDGE_CONFIG, published, write_judge, write_judge_weights
from tiny_videos import noise
from torch import Tensor

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.qwen_judge import Clip, QwenJudge
from vpo_engine.rewards.videoscore2 import CARD, DIMENSIONS, QUESTION, VideoScore2, parse, soft_score

DATA = Path(__file__).parents[1] / "data" / "rewards" / "videoscore2"
GOLDEN, IO = json.loads((DATA / "golden.json").read_text()), load_file(DATA / "io.safetensors")
CAT = "A cat jumps over a wall"
LOGITS = [[-3.0, -1.0, 2.0, 8.0, 7.0], [1.0, 0.0, 9.0, 8.5, -2.0], [0.0, 0.0, 0.0, 4.0, 7.0]]
ANSWER = [
    "<think>\nfine, 9/10. (1) visual quality: 2\n</think>\n\n",
    "(1) visual quality - clarity, smoothness, artifacts: ",
    ("4", LOGITS[0]),
    "\n(2) text-to-video alignment - fidelity to the prompt: ",
    ("3", LOGITS[1]),
    "\n(3) physical/common-sense consistency - naturalness: ",
    ("5", LOGITS[2]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("videoscore2") / "taught", ANSWER)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> VideoScore2:
    return VideoScore2.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> QwenJudge:
    folder = write_judge(tmp_path_factory.mktemp("videoscore2") / "random")
    return VideoScore2.from_pretrained(folder, dtype=torch.float32, max_new_tokens=6).judge


def clips(count: int, frames: int = 4) -> Tensor:
    return noise(count, frames, 24, 30, 3)


class TestReading:
    def test_question_is_the_published_one(self) -> None:
        """The fixture's copy lost the spaces at two line ends."""
        assert QUESTION.replace("; \n", ";\n").replace(", \n", ",\n") == GOLDEN["query_template"]

    def test_answers(self) -> None:
        listed, lines = GOLDEN["parsed_numbered_list_pattern"], GOLDEN["parsed_simple_colon_pattern"]
        for text, numbered, simple in zip(GOLDEN["texts"], listed, lines, strict=True):
            expected = numbered or (simple if None not in simple else None)
            if expected is None:
                with pytest.raises(
                    ValueError, match=r"holds no grades .*'nothing here'; the video gets no score"
                ):
                    parse(text)
            else:
                grades, places = parse(text)
                assert grades == expected
                assert [int(text[place]) for place in places] == grades

    @pytest.mark.parametrize("grade", ["0", "6", "4.5", "4/5", "40", "-", ""])
    def test_what_is_no_grade(self, grade: str) -> None:
        text = f"visual quality: 4;\ntext-to-video alignment: {grade},\nphysical/common-sense consistency: 2"
        with pytest.raises(ValueError, match="holds no grades"):
            parse(text)

    def test_thoughts_are_not_read(self) -> None:
        graded = GOLDEN["texts"][1]
        with pytest.raises(ValueError, match="holds no grades"):
            parse(f"<think>{graded}</think> nothing")
        assert parse(f"<think>{graded.replace('4', '1')}</think>{graded}")[0] == [4, 3, 2]

    def test_long_answers_are_shortened_in_errors(self) -> None:
        with pytest.raises(ValueError, match=r"holds no grades") as caught:
            parse("x" * 5000)
        assert len(str(caught.value)) < 500

    def test_soft_scores(self) -> None:
        digits = [GOLDEN["digit_ids_in_logits"][digit] for digit in "12345"]
        for logits, expected in zip(IO["score_token_logits"], IO["soft_score_published"], strict=True):
            assert soft_score(logits[digits]) == pytest.approx(expected.item(), abs=1e-4)

    def test_the_soft_score_is_not_monotone(self) -> None:
        five, four = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.6], [0.025, 0.025, 0.025, 0.9, 0.025]]).log()
        assert soft_score(five) == 3.0
        assert soft_score(four) == 3.6


class TestJudge:
    def test_scores_of_an_answer(self, scorer: VideoScore2) -> None:
        before = torch.get_rng_state()
        scores = scorer.score(clips(2), [CAT, "a dog"])
        assert tuple(scores) == scorer.dimensions == DIMENSIONS == tuple(CARD.dimensions)
        for name, logits in zip(DIMENSIONS, LOGITS, strict=True):
            expected = soft_score(torch.tensor(logits))
            assert scores[name].dtype == torch.float32
            assert scores[name].tolist() == pytest.approx([expected] * 2, abs=1e-4)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_whole_answer(self, scorer: VideoScore2) -> None:
        answer = scorer.ask(clips(1)[0], CAT)
        assert answer.text == "".join(step if isinstance(step, str) else step[0] for step in ANSWER)
        assert answer.digits.shape == (len(ANSWER), 5)
        torch.testing.assert_close(answer.digits[2::2], torch.tensor(LOGITS), rtol=0, atol=1e-4)

    def test_what_is_shown(self, scorer: VideoScore2) -> None:
        """24 frames at 24 a second are 4 frames, two temporal patches a second apart."""
        seen: list[tuple[Clip, str]] = []
        judge = QwenJudge(scorer.network, scorer.judge.tokenizer, name="x", max_new_tokens=9)
        judge.answer = lambda clips, question, prompt: seen.append((*clips, question))  # type: ignore[method-assign]
        VideoScore2(judge).ask(clips(1, frames=24)[0], CAT)
        clip, question = seen[0]
        assert clip.seconds == 1.0
        assert clip.frames.shape == (4, 3, *qwen_vl.smart_resize(24, 30, 100352, 602112))
        assert question == QUESTION.replace("$t2v_prompt", CAT)

    def test_greedy_steps_equal_whole_forwards(self, untaught: QwenJudge) -> None:
        """With the cache and with none; the 3-D positions of the clip are transformers'."""
        clip = Clip(clips(1)[0].permute(0, 3, 1, 2)[:, :, :1, :1].repeat(1, 1, 56, 84), 1.0)
        inputs = untaught._inputs([clip], "is it?")
        ids, digits = [], []
        for _ in range(5):
            logits = untaught.network(**inputs).logits[0, -1]
            ids.append(int(logits.argmax()))
            digits.append(logits[untaught._digits])
            for key, value in (("input_ids", ids[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                grown = torch.cat([inputs[key][0], torch.tensor([value], dtype=inputs[key].dtype)])
                inputs[key] = grown[None]
        stop = next(step for step in range(1, 5) if ids[step] not in ids[:step])
        judge = QwenJudge(untaught.network, untaught.tokenizer, name="x", max_new_tokens=5)
        judge._end = ids[stop]
        answer = judge.answer([clip], "is it?", CAT)
        assert answer.ids == ids[:stop]
        other = untaught.network(**untaught._inputs([Clip(255 - clip.frames, 1.0)], "is it?")).logits[0, -1]
        assert (other[untaught._digits] - digits[0]).abs().max() > 1e-4
        torch.testing.assert_close(answer.digits, torch.stack(digits)[:stop], rtol=0, atol=1e-4)

    def test_places_and_kinds(self, untaught: QwenJudge) -> None:
        clip = Clip(torch.zeros(3, 3, 28, 56, dtype=torch.uint8), 1.0)
        inputs = untaught._inputs([clip, clip], "q")
        text = untaught.tokenizer.decode(inputs["input_ids"][0].tolist(), skip_special_tokens=False)
        slots = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
        assert f"<|im_start|>user\n{slots}{slots}q<|im_end|>\n<|im_start|>assistant\n" in text
        assert int((inputs["mm_token_type_ids"] == 2).sum()) == 8
        assert inputs["video_grid_thw"].tolist() == [[2, 2, 4]] * 2
        assert inputs["second_per_grid_ts"].tolist() == [1.0, 1.0]

    def test_answer_without_an_end(self, untaught: QwenJudge) -> None:
        with pytest.raises(
            ValueError, match=r"answer about 'A cat.*' has no end within 6 tokens: .*raise max_new"
        ):
            VideoScore2(untaught).score(clips(1), [CAT])

    def test_answer_that_does_not_parse(self, tmp_path: Path) -> None:
        scorer = VideoScore2.from_pretrained(write_judge(tmp_path / "mute", ["nothing here"]))
        with pytest.raises(ValueError, match=r"holds no grades .*'nothing here'; the video gets no score"):
            scorer.score(clips(1), [CAT])

    def test_digits_joined_to_other_text(self, scorer: VideoScore2) -> None:
        answer = scorer.ask(clips(1)[0], CAT)
        with pytest.raises(ValueError, match="no token of VideoScore2's answer ends at character 3"):
            scorer.judge.step_of(answer, 3)

    def test_the_folders_settings_of_generation_change_nothing(self, tmp_path: Path) -> None:
        """Qwen's have a penalty for tokens that were there before, those of the question among them."""
        folder = write_judge(tmp_path / "taught", ANSWER)
        settings = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        answer = VideoScore2.from_pretrained(folder, dtype=torch.float32).ask(clips(1)[0], CAT)
        torch.testing.assert_close(answer.digits[2::2], torch.tensor(LOGITS), rtol=0, atol=1e-4)


class TestLoading:
    def test_weights(self, scorer: VideoScore2, folder: Path) -> None:
        files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        stored = files[0] | files[1]
        state = {published(key): weight for key, weight in scorer.network.state_dict().items()}
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored)
        assert not any(weight.requires_grad for weight in scorer.network.parameters())
        assert not scorer.network.training
        assert VideoScore2.from_pretrained(folder).network.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "model.safetensors.index.json"], ids=lambda name: name
    )
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=r"no (config|tokenizer|model)\..* in .*TIGER-Lab/VideoScore2"
        ):
            VideoScore2.from_pretrained(copy)

    def test_missing_shard(self, copy: Path) -> None:
        (copy / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ValueError, match=r"weights in .* cannot be read .*model-00002-of-00002"):
            VideoScore2.from_pretrained(copy)

    @pytest.mark.parametrize(
        ("key", "weight", "message"),
        [
            ("lm_head.weight", None, "missing lm_head.weight"),
            ("score.weight", torch.zeros(1, 64), "unexpected score.weight"),
            ("model.norm.weight", torch.zeros(3), "model.language_model.norm.weight of another shape"),
        ],
    )
    def test_wrong_weights(self, copy: Path, key: str, weight: Tensor | None, message: str) -> None:
        files = [load_file(path) for path in sorted(copy.glob("*.safetensors"))]
        weights = files[0] | files[1]
        if weight is None:
            weights.pop(key)
        else:
            weights[key] = weight
        write_judge_weights(copy, weights)
        with pytest.raises(ValueError, match=r"is not a checkpoint of VideoScore2.*" + re.escape(message)):
            VideoScore2.from_pretrained(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "qwen2_vl"}, "has model_type 'qwen2_vl', expected 'qwen2_5_vl'"),
            ({"video_token_id": 3}, "gives <|video_pad|> the id 183, expected 3"),
        ],
    )
    def test_wrong_config(self, copy: Path, change: dict, message: str) -> None:
        (copy / "config.json").write_text(json.dumps(JUDGE_CONFIG | change))
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoScore2.from_pretrained(copy)

    @pytest.mark.parametrize("name", ["fps", "max_new_tokens"])
    def test_numbers_are_positive(self, folder: Path, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is 0, expected"):
            VideoScore2.from_pretrained(folder, **{name: 0})
