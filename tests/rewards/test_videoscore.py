"""VideoScore against the authors' code on tiny weights, loaded as the published checkpoints are."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videos import noise, stacked
from torch import Tensor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from vpo_engine.rewards.videoscore import (
    DIMENSIONS,
    QUESTION,
    FrameProcessor,
    VideoScore,
    frame_indices,
    question,
)

DATA = Path(__file__).parents[1] / "data" / "rewards" / "videoscore"
TINY, GOLDEN = DATA / "tiny_model", json.loads((DATA / "prompt_and_sampling" / "golden.json").read_text())
IO = load_file(TINY / "io.safetensors")
CAT, ODD = (case["text_prompt"] for case in GOLDEN["formatted"][:2])
TOLERANCE = {"logits_atol": 1e-5, "grad_atol": 1e-6}
"""Tighter than the 2e-4 stated with the fixtures; measured are 1e-6 and 1e-7. Gradients reach 3e-2."""


def write_checkpoint(folder: Path, shards: int = 2, size: tuple[int, int] = (28, 56)) -> Path:
    """The tiny model in the published layout: configs, tokenizer and (sharded) safetensors."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizer" / name, folder / name)
    shutil.copy(TINY / "config.json", folder / "config.json")
    fields = {"do_image_splitting": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    fields |= {"size": {"shortest_edge": size[0], "longest_edge": size[1]}}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    write_weights(folder, load_file(TINY / "weights.safetensors"), shards)
    return folder


def write_weights(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    owner = {key: names[place % shards] for place, key in enumerate(sorted(weights))}
    for name in names:
        save_file({key: weights[key] for key in weights if owner[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("videoscore") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> VideoScore:
    return VideoScore.from_pretrained(folder, dtype=torch.float32)


def clips(count: int, frames: int = 5) -> Tensor:
    return noise(count, frames, 24, 30, 3)


class TestText:
    def test_question_is_the_published_one(self) -> None:
        assert hashlib.sha256(QUESTION.encode()).hexdigest() == GOLDEN["template_sha256"]
        assert GOLDEN["regression_template"] == QUESTION

    @pytest.mark.parametrize("case", GOLDEN["formatted"], ids=lambda case: f"{case['n_frames']} frames")
    def test_formatted(self, case: dict) -> None:
        assert question(case["text_prompt"], case["n_frames"]) == case["text"]

    def test_dimensions_are_in_the_models_order(self) -> None:
        published = [name.replace(" ", "_") for name in GOLDEN["dimensions_in_logit_order"]]
        assert published == [name.replace("text_a", "text-to-video_a") for name in DIMENSIONS]

    @pytest.mark.parametrize(("case", "prompt"), [("s0", CAT), ("s1", ODD), ("s2", "")])
    def test_ids(self, scorer: VideoScore, case: str, prompt: str) -> None:
        frames = IO[f"{case}.pixel_values"].shape[1]
        assert torch.equal(scorer.encode(prompt, frames), IO[f"{case}.input_ids"][0])

    def test_start_token_is_added_where_the_tokenizer_adds_none(self, copy: Path) -> None:
        fields = json.loads((copy / "tokenizer.json").read_text()) | {"post_processor": None}
        (copy / "tokenizer.json").write_text(json.dumps(fields))
        scorer = VideoScore.from_pretrained(copy, dtype=torch.float32)
        assert torch.equal(scorer.encode(CAT, 8), IO["s0.input_ids"][0])


class TestFrames:
    @pytest.mark.parametrize("limit", [16, 48])
    def test_sampling(self, limit: int) -> None:
        for count, indices in GOLDEN["indices_example_script"][str(limit)].items():
            assert frame_indices(int(count), limit) == indices

    def test_sampling_is_numpys_arange(self) -> None:
        for count in range(17, 2000):
            assert frame_indices(count, 16) == np.arange(0, count, count / 16).astype(int).tolist()

    def test_sizes(self) -> None:
        golden = json.loads((DATA / "resize_sizes" / "golden.json").read_text())
        processor = FrameProcessor(**golden["size"])
        for (height, width), expected in golden["height_width_in_to_out"]:
            assert processor.output_size(height, width) == tuple(expected), (height, width)

    @pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
    def test_pixels_at_real_size(self, tmp_path: Path, case: str) -> None:
        io = load_file(DATA / "preprocess_real_size" / "io.safetensors")
        scorer = VideoScore.from_pretrained(write_checkpoint(tmp_path / "real", size=(378, 980)))
        pixels = scorer.preprocess(io[f"{case}.frames"][None])
        assert list(pixels.shape) == io[f"{case}.pixel_values.shape"].tolist()
        found = pixels.flatten()[io[f"{case}.pixel_values.idx"]]
        torch.testing.assert_close(found, io[f"{case}.pixel_values.val"], rtol=0, atol=1e-5)
        wide = pixels.double()
        stat = torch.stack([wide.mean(), wide.std(), wide.abs().sum(), wide.min(), wide.max()])
        torch.testing.assert_close(stat, io[f"{case}.pixel_values.stat"], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("size", [(17, 31), (400, 700), (1100, 300)])
    def test_pixels_equal_transformers_bit_for_bit(self, size: tuple[int, int]) -> None:
        frames = torch.randint(
            0, 256, (2, *size, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
        )
        theirs = Idefics2ImageProcessorPil()([list(frames.numpy())], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(FrameProcessor(378, 980)(frames), theirs)


class TestScores:
    @pytest.mark.parametrize(("case", "prompt"), [("s0", CAT), ("s1", ODD)])
    def test_score(self, scorer: VideoScore, case: str, prompt: str) -> None:
        scores = scorer.score(IO[f"{case}.frames"][None], [prompt])
        assert tuple(scores) == scorer.dimensions == DIMENSIONS
        assert all(value.shape == (1,) and value.dtype == torch.float32 for value in scores.values())
        torch.testing.assert_close(
            stacked(scores), IO[f"{case}.logits"], rtol=0, atol=TOLERANCE["logits_atol"]
        )

    @pytest.mark.parametrize(("case", "prompt"), [("s0", CAT), ("s1", ODD), ("s2", "")])
    def test_logits_and_their_gradient(self, scorer: VideoScore, case: str, prompt: str) -> None:
        pixels = scorer.preprocess(IO[f"{case}.frames"][None])
        assert torch.equal(pixels, IO[f"{case}.pixel_values"])
        logits = scorer.logits(pixels.requires_grad_(), [prompt])
        torch.testing.assert_close(logits, IO[f"{case}.logits"], rtol=0, atol=TOLERANCE["logits_atol"])
        (logits @ torch.tensor([1, 0.5, -0.25, 2, -1])).sum().backward()
        assert pixels.grad is not None
        expected = IO[f"{case}.grad_pixel_values.val"]
        torch.testing.assert_close(pixels.grad[..., ::5, ::5], expected, rtol=0, atol=TOLERANCE["grad_atol"])
        assert all(weight.grad is None for weight in scorer.network.parameters())

    @pytest.mark.parametrize("side", ["b_left", "b_right"])
    def test_each_video_of_the_authors_mixed_batch(self, scorer: VideoScore, side: str) -> None:
        for row, (frames, prompt) in enumerate([("b.frames_a", CAT), ("b.frames_b", "")]):
            logits = scorer.logits(scorer.preprocess(IO[frames][None]), [prompt])[0]
            torch.testing.assert_close(
                logits, IO[f"{side}.logits"][row], rtol=0, atol=TOLERANCE["logits_atol"]
            )

    def test_reads_what_it_is_given(self, scorer: VideoScore) -> None:
        videos = clips(2)
        base, other = stacked(scorer.score(videos, [CAT, CAT])), stacked(scorer.score(videos, [CAT, "a dog"]))
        assert torch.equal(base[0], other[0])
        assert (base[1] - other[1]).abs().max() > 1e-3
        assert (base[0] - base[1]).abs().max() > 1e-3

    def test_one_frame_is_refused(self, scorer: VideoScore) -> None:
        with pytest.raises(
            ValueError, match="videos have 1 frame, expected at least 2: VideoScore judges motion too"
        ):
            scorer.score(clips(1, frames=1), [CAT])
        assert stacked(scorer.score(clips(1, frames=2), [CAT])).isfinite().all()

    def test_max_frames_decides_what_is_seen(self, folder: Path) -> None:
        """v1 sees every other frame of 32, v1.1 all of them."""
        videos = clips(1, frames=32)
        changed = videos.clone()
        changed[:, 1::2] = 255 - changed[:, 1::2]
        for limit, same in ((16, True), (48, False)):
            scorer = VideoScore.from_pretrained(folder, dtype=torch.float32, max_frames=limit)
            pair = [stacked(scorer.score(clip, [CAT])) for clip in (videos, changed)]
            assert torch.equal(*pair) is same

    def test_a_flat_grey_frame_counts(self, scorer: VideoScore) -> None:
        """transformers' own forward takes normalised zeros for padding and drops the frame."""
        pixels = scorer.preprocess(clips(1))
        pixels[:, 2] = 0
        nearly = pixels.clone()
        nearly[:, 2, :, 0, 0] = 1e-6
        torch.testing.assert_close(
            scorer.logits(pixels, [CAT]), scorer.logits(nearly, [CAT]), rtol=0, atol=1e-5
        )


class TestLoading:
    def test_one_file_or_shards(self, scorer: VideoScore, tmp_path: Path) -> None:
        single = VideoScore.from_pretrained(str(write_checkpoint(tmp_path / "one", 1)), dtype=torch.float32)
        videos = clips(1)
        assert torch.equal(stacked(single.score(videos, [CAT])), stacked(scorer.score(videos, [CAT])))

    def test_bfloat16_keeps_a_float32_head(self, scorer: VideoScore, folder: Path) -> None:
        half = VideoScore.from_pretrained(folder)
        kinds = {name: weight.dtype for name, weight in half.network.named_parameters()}
        assert {kinds.pop("score.weight"), kinds.pop("score.bias")} == {torch.float32}
        assert set(kinds.values()) == {torch.bfloat16}
        videos = clips(4)
        ours, exact = stacked(half.score(videos, [CAT] * 4)), stacked(scorer.score(videos, [CAT] * 4))
        assert (ours - exact).abs().max() < 0.05
        assert not torch.equal(ours, ours.bfloat16().float())

    @pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {name} in .*TIGER-Lab/VideoScore"):
            VideoScore.from_pretrained(copy)

    def test_missing_shard(self, copy: Path) -> None:
        (copy / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"no weight file model-00002-of-00002.safetensors"):
            VideoScore.from_pretrained(copy)

    def test_truncated_shard(self, copy: Path) -> None:
        shard = copy / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(
            ValueError, match=r"model-00002-of-00002.safetensors cannot be read .*fetch it again"
        ):
            VideoScore.from_pretrained(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("score.bias"), "1 weights disagree: missing score.bias"),
            (lambda w: w.update({"lm_head.weight": torch.zeros(360, 32)}), "unexpected lm_head.weight"),
            (
                lambda w: w.update({"score.weight": torch.zeros(1, 32)}),
                "score.weight is [1, 32], expected [5, 32]",
            ),
        ],
        ids=["no head", "language model", "one output"],
    )
    def test_wrong_weights(
        self, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        folder = write_checkpoint(tmp_path / "wrong", 1)
        weights = load_file(TINY / "weights.safetensors")
        change(weights)
        write_weights(folder, weights)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            VideoScore.from_pretrained(folder)
        assert "is not a checkpoint of VideoScore, 1 weights disagree" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("config.json", {"model_type": "qwen2_vl"}, "has model_type 'qwen2_vl', expected 'idefics2'"),
            ("config.json", {"image_token_id": 6}, "gives <image> the id 5, expected 6"),
            (
                "preprocessor_config.json",
                {"image_mean": [0.48] * 3},
                "has image_mean [0.48, 0.48, 0.48], expected",
            ),
            (
                "preprocessor_config.json",
                {"size": {"height": 224}},
                "expected shortest_edge and longest_edge",
            ),
        ],
    )
    def test_wrong_settings(self, copy: Path, name: str, change: dict, message: str) -> None:
        fields = json.loads((copy / name).read_text()) | change
        (copy / name).write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoScore.from_pretrained(copy)

    def test_unreadable_settings(self, copy: Path) -> None:
        (copy / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not JSON"):
            VideoScore.from_pretrained(copy)


class TestRefusals:
    @pytest.mark.parametrize("token", ["<image>", "<fake_token_around_image>", "<pad>", "</s>"])
    def test_special_token_in_a_prompt(self, scorer: VideoScore, token: str) -> None:
        with pytest.raises(ValueError, match=f"contains '{token}', which .* remove it from the prompt"):
            scorer.score(clips(1), [f"an {token} of a cat"])

    def test_scores_that_are_not_finite(self, copy: Path) -> None:
        scorer = VideoScore.from_pretrained(copy, dtype=torch.float32, batch_size=1)
        with torch.no_grad():
            scorer.network.score.bias[3] = float("nan")
        with pytest.raises(ValueError, match=r"VideoScore \(text_alignment\) gave nan for input 0 \('A cat"):
            scorer.score(clips(2), [CAT, ODD])
