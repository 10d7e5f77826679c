"""VideoAlign against the authors' code on tiny weights, loaded as the published checkpoint is."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen import write_tokenizer
from tiny_videos import noise, stacked
from torch import Tensor
from transformers import Qwen2VLConfig

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.qwen_vl import check_rope
from vpo_engine.rewards.videoalign import (
    CARD,
    TEMPLATE,
    VideoAlign,
    VideoAlignNetwork,
)
from vpo_engine.rewards.videoalign_checkpoint import QWEN2_VL_2B, merge_lora

DATA = Path(__file__).parents[1] / "data" / "rewards" / "videoalign"
TINY = DATA / "tiny_model"
GOLDEN, META = json.loads((DATA / "golden.json").read_text()), json.loads((TINY / "meta.json").read_text())
IO = load_file(TINY / "io.safetensors")
CAT, DOG = "A cat jumps over a wall", "a dog"
SPECIAL = {
    "<|vision_start|>": 140,
    "<|vision_end|>": 141,
    "<|image_pad|>": 142,
    "<|video_pad|>": 143,
    "<|VQ_reward|>": 144,
    "<|MQ_reward|>": 145,
    "<|TA_reward|>": 146,
    "<|endoftext|>": 147,
    "<|im_start|>": 148,
    "<|im_end|>": 149,
}
SETTINGS = {
    "data_config": {"max_frame_pixels": 200704, "fps": 2.0, "num_frames": None, "sample_type": "uniform"},
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False},
    "inference_config": {
        f"{name}_{part}": META["calibration"][name][index]
        for name in ("VQ", "MQ", "TA")
        for index, part in enumerate(("mean", "std"))
    },
}
ATOL = 1e-5
"""Tighter than the 2e-4 stated with the fixtures; measured is 1e-6."""


def as_peft(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published file's names: adapters on the language model's linears, here of rank 4 and alpha 8."""
    found = {"base_model.model.lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    generator = torch.Generator().manual_seed(3)
    for key, weight in weights.items():
        name = f"base_model.model.{key}"
        if not (key.startswith("model.layers.") and "proj." in key):
            found[name] = weight
            continue
        module, kind = name.rsplit(".", 1)
        if kind == "weight":
            down = torch.randn(4, weight.shape[1], generator=generator) / 8
            up = torch.randn(weight.shape[0], 4, generator=generator) / 8
            found |= {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}
            weight = weight - 2 * up @ down
        found[f"{module}.base_layer.{kind}"] = weight
    return found


def write_checkpoint(folder: Path, step: int = 11352) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(SETTINGS))
    shutil.copy(TINY / "config.json", folder / "config.json")
    torch.save(as_peft(load_file(TINY / "weights.safetensors")), checkpoint / "model.pth")
    write_tokenizer(checkpoint / "tokenizer" / "tokenizer.json", SPECIAL)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("videoalign") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> VideoAlign:
    return VideoAlign.from_pretrained(folder, dtype=torch.float32)


def clips(count: int, frames: int = 8) -> Tensor:
    return noise(count, frames, 24, 30, 3)


class TestPreprocessing:
    @pytest.mark.parametrize("case", GOLDEN["resize"], ids=lambda case: "x".join(map(str, case["in"])))
    def test_sizes(self, case: dict) -> None:
        found = qwen_vl.smart_resize(*case["in"], qwen_vl.VIDEO_MIN_PIXELS, 200704)
        assert list(found) == case["out_min128x28x28_max200704"]

    @pytest.mark.parametrize("case", GOLDEN["nframes_fps2"], ids=lambda case: str(case["total"]))
    def test_frames(self, case: dict) -> None:
        found = qwen_vl.frame_indices(case["total"], case["video_fps"], 2.0)
        assert found == case["indices"]
        assert len(found) == case["nframes"]

    def test_frames_of_the_shortest_clips(self) -> None:
        assert [qwen_vl.frame_indices(count, 24, 2) for count in (2, 3)] == [[0, 1], [0, 2]]

    def test_extreme_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"frames are 1 x 400, expected an aspect ratio of at most 200"):
            qwen_vl.smart_resize(1, 400, 100352, 200704)
        with pytest.raises(ValueError, match="frames are 40 x 8000, too narrow for 100352 pixels"):
            qwen_vl.smart_resize(40, 8000, 3136, 100352)

    def test_resized_bytes_and_patches(self) -> None:
        io = load_file(DATA / "preprocess" / "io.safetensors")
        resized = qwen_vl.resize_levels(io["frames"], (28, 56))
        assert torch.equal(resized, io["resized"])
        patches, grid = qwen_vl.patchify(resized / 255)
        assert list(grid) == io["video_grid_thw"][0].tolist()
        torch.testing.assert_close(patches, io["pixel_values_videos"], rtol=0, atol=1e-5)

    def test_an_odd_frame_is_repeated(self) -> None:
        pixels = torch.rand(3, 3, 28, 28)
        patches, grid = qwen_vl.patchify(pixels)
        expected, _ = qwen_vl.patchify(torch.cat([pixels, pixels[2:]]))
        assert grid == (2, 2, 2)
        assert torch.equal(patches, expected)


class TestText:
    def test_template_is_the_published_one(self) -> None:
        digest = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
        assert hashlib.sha256(TEMPLATE.encode()).hexdigest() == digest

    def test_chat(self, scorer: VideoAlign) -> None:
        ids = scorer.encode("a {cat}", (2, 2, 4))
        text = scorer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        start = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        assert text.startswith(start + "<|video_pad|>" * 4 + "<|vision_end|>\nYou are tasked with evaluating")
        assert text.endswith(
            "Textual prompt - a {cat}\nPlease provide the ratings of Text Alignment: <|TA_reward|>\nEND\n"
            "<|im_end|>\n<|im_start|>assistant\n"
        )


class TestScores:
    def test_outputs_of_the_authors_code(self, scorer: VideoAlign) -> None:
        """Two clips of different shape in one batch; the patches from the frames, the ids as given."""
        made = [qwen_vl.patchify(IO[f"v{i}.frames"].permute(0, 3, 1, 2) / 255) for i in (0, 1)]
        patches, grids = torch.cat([part for part, _ in made]), [grid for _, grid in made]
        assert [list(grid) for grid in grids] == IO["video_grid_thw"].tolist()
        torch.testing.assert_close(patches, IO["pixel_values_videos"], rtol=0, atol=ATOL)
        logits = scorer.logits(list(IO["input_ids"]), patches, grids)
        torch.testing.assert_close(logits, IO["logits"], rtol=0, atol=ATOL)
        assert (logits - IO["logits_if_mrope_positions"]).abs().max() > 1e-2
        scores = scorer.calibrated(logits)
        torch.testing.assert_close(scores, IO["normalised"], rtol=0, atol=ATOL)
        torch.testing.assert_close(scores.sum(1), IO["overall"], rtol=0, atol=3 * ATOL)

    def test_gradients_of_the_authors_code(self, scorer: VideoAlign) -> None:
        patches = IO["pixel_values_videos"].clone().requires_grad_()
        grids = [tuple(row) for row in IO["video_grid_thw"].tolist()]
        logits = scorer.logits(list(IO["input_ids"]), patches, grids)
        (logits * torch.tensor([1, -0.5, 2])).sum().backward()
        assert patches.grad is not None
        expected = IO["grad_pixel_values_videos"]
        torch.testing.assert_close(patches.grad[:, ::7], expected, rtol=0, atol=ATOL)
        assert expected.abs().max() > 100 * ATOL
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_reads_prompt_frames_and_rate(self, scorer: VideoAlign) -> None:
        """Only the text alignment comes after the prompt; at 24 a second 4 of 16 frames are seen, at 2 all."""
        videos = clips(1, frames=16)
        base, other = stacked(scorer.score(videos, [CAT])), stacked(scorer.score(videos, [DOG]))
        assert torch.equal(base[:, :2], other[:, :2])
        assert (base[:, 2] - other[:, 2]).abs() > 1e-4
        unseen = videos.clone()
        unseen[:, 1] = 255 - unseen[:, 1]
        assert torch.equal(stacked(scorer.score(unseen, [CAT])), base)
        slow = VideoAlign(scorer.network, scorer.tokenizer, fps=2.0)
        pair = [stacked(slow.score(video, [CAT])) for video in (videos, unseen)]
        assert (pair[0] - pair[1]).abs().max() > 1e-5

    def test_pixels(self, scorer: VideoAlign) -> None:
        """Against ``score``: resized frames are not rounded, so values differ by half a level."""
        videos, prompts = clips(1), [CAT]
        pixels = (videos.permute(0, 1, 4, 2, 3) / 255).requires_grad_()
        scores = scorer.score_pixels(pixels, prompts)
        torch.testing.assert_close(stacked(scores), stacked(scorer.score(videos, prompts)), rtol=0, atol=1e-3)
        stacked(scores).sum().backward()
        assert pixels.grad is not None
        assert bool(pixels.grad.isfinite().all())
        seen = qwen_vl.frame_indices(8, 24.0, 2.0)
        assert [frame for frame in range(8) if bool(pixels.grad[:, frame].any())] == seen

    def test_gradients_of_pixels_are_the_slope(self, folder: Path) -> None:
        scorer = VideoAlign.from_pretrained(folder, dtype=torch.float64, batch_size=1)
        generator = torch.Generator().manual_seed(5)
        pixels = torch.rand(1, 4, 3, 28, 28, generator=generator) * 0.5 + 0.25
        step = torch.randn(pixels.shape, generator=generator)
        pixels.requires_grad_()
        (slope,) = torch.autograd.grad(stacked(scorer.score_pixels(pixels, [CAT])).sum(), pixels)
        with torch.no_grad():
            ends = [
                stacked(scorer.score_pixels(pixels + sign * 0.01 * step, [CAT])).sum() for sign in (1, -1)
            ]
        torch.testing.assert_close((ends[0] - ends[1]) / 0.02, (slope * step).sum(), rtol=0.05, atol=1e-5)


class TestLoading:
    def test_adapters_are_merged(self, scorer: VideoAlign) -> None:
        published, state = load_file(TINY / "weights.safetensors"), scorer.network.state_dict()
        assert state.keys() == published.keys()
        for name, weight in published.items():
            torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
        assert not any(weight.requires_grad for weight in scorer.network.parameters())
        assert not scorer.network.training

    def test_plain_safetensors_come_first_and_the_newest_checkpoint(
        self, scorer: VideoAlign, copy: Path
    ) -> None:
        shutil.move(copy / "checkpoint-11352" / "tokenizer" / "tokenizer.json", copy / "tokenizer.json")
        (copy / "checkpoint-99").mkdir()
        weights = load_file(TINY / "weights.safetensors")
        weights["rm_head.weight"] *= 2
        save_file(weights, copy / "checkpoint-11352" / "model.safetensors")
        doubled = VideoAlign.from_pretrained(copy, dtype=torch.float32)
        grids = [tuple(row) for row in IO["video_grid_thw"].tolist()]
        logits = doubled.logits(list(IO["input_ids"]), IO["pixel_values_videos"], grids)
        torch.testing.assert_close(logits, 2 * IO["logits"], rtol=0, atol=ATOL)

    def test_rank_stabilised_adapters(self, scorer: VideoAlign, copy: Path) -> None:
        fields = SETTINGS | {"peft_lora_config": {"lora_r": 4, "lora_alpha": 4, "use_rslora": True}}
        (copy / "model_config.json").write_text(json.dumps(fields))
        again = VideoAlign.from_pretrained(copy, dtype=torch.float32).network.state_dict()
        assert all(torch.equal(again[name], weight) for name, weight in scorer.network.state_dict().items())

    def test_bfloat16_keeps_a_float32_head(self, scorer: VideoAlign, folder: Path) -> None:
        half = VideoAlign.from_pretrained(folder)
        kinds = {name: weight.dtype for name, weight in half.network.named_parameters()}
        assert kinds.pop("rm_head.weight") == torch.float32
        assert set(kinds.values()) == {torch.bfloat16}
        assert torch.equal(half.network.rm_head.weight, scorer.network.rm_head.weight)
        videos = clips(1)
        pair = [stacked(model.score(videos, [CAT])) for model in (half, scorer)]
        assert (pair[0] - pair[1]).abs().max() < 0.05

    def test_without_inference_config_scores_are_the_heads(self, scorer: VideoAlign, copy: Path) -> None:
        fields = {key: value for key, value in SETTINGS.items() if key != "inference_config"}
        (copy / "model_config.json").write_text(json.dumps(fields))
        raw = stacked(VideoAlign.from_pretrained(copy, dtype=torch.float32).score(clips(1), [CAT]))
        torch.testing.assert_close(
            scorer.calibrated(raw), stacked(scorer.score(clips(1), [CAT])), rtol=0, atol=ATOL
        )

    def test_the_published_size(self) -> None:
        with torch.device("meta"):
            network = VideoAlignNetwork(Qwen2VLConfig(**QWEN2_VL_2B, vocab_size=151660))
        assert sum(weight.numel() for weight in network.parameters()) == CARD.parameters

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("model_config.json", "no model_config.json in"),
            ("checkpoint-11352/model.pth", "no weight file in"),
            ("checkpoint-11352/tokenizer/tokenizer.json", "no tokenizer.json in"),
            ("checkpoint-11352", "no checkpoint-* folder in"),
        ],
    )
    def test_missing(self, copy: Path, name: str, message: str) -> None:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(message) + ".*KlingTeam/VideoReward"):
            VideoAlign.from_pretrained(copy)

    def test_built_in_sizes_refuse_another_model(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(ValueError, match=r"gives <\|video_pad\|> the id 143, expected 151656"):
            VideoAlign.from_pretrained(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("base_model.model.rm_head.weight"), "missing rm_head.weight"),
            (lambda w: w.update({"score.weight": torch.zeros(1)}), "unexpected score.weight"),
            (
                lambda w: w.update({"base_model.model.rm_head.weight": torch.zeros(3, 32)}),
                "rm_head.weight is [3, 32], expected [1, 32]",
            ),
        ],
        ids=["no head", "foreign", "three outputs"],
    )
    def test_wrong_weights(
        self, copy: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        weights = as_peft(load_file(TINY / "weights.safetensors"))
        change(weights)
        torch.save(weights, copy / "checkpoint-11352" / "model.pth")
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoAlign.from_pretrained(copy)

    def test_half_an_adapter(self) -> None:
        weights = as_peft(load_file(TINY / "weights.safetensors"))
        weights.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight")
        with pytest.raises(
            ValueError, match=r"adapter of model.layers.0.mlp.up_proj.weight: .*\[4, 32\], None"
        ):
            merge_lora(weights, scale=2.0)

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("model_config", {"output_dim": 3}, "model_config.output_dim 3, expected 1"),
            ("data_config", {"prompt_template_type": "simple"}, "'simple', expected 'detailed_special'"),
            ("inference_config", {"VQ_mean": 1.0}, "no inference_config.VQ_std"),
        ],
    )
    def test_wrong_settings(self, copy: Path, part: str, change: dict, message: str) -> None:
        (copy / "model_config.json").write_text(json.dumps(SETTINGS | {part: change}))
        with pytest.raises(ValueError, match=re.escape(message)):
            VideoAlign.from_pretrained(copy)

    def test_tokenizer_without_the_reward_tokens(self, copy: Path) -> None:
        special = {token: index for token, index in SPECIAL.items() if "reward" not in token and index < 144}
        write_tokenizer(copy / "checkpoint-11352" / "tokenizer" / "tokenizer.json", special)
        with pytest.raises(ValueError, match=r"gives <\|VQ_reward\|> the id None, expected one"):
            VideoAlign.from_pretrained(copy)

    def test_the_base_has_more_embeddings_than_the_checkpoint(self, copy: Path) -> None:
        """Training cuts them to the tokenizer, of 151,936 to 151,660."""
        fields = json.loads((copy / "config.json").read_text()) | {"vocab_size": 160}
        (copy / "config.json").write_text(json.dumps(fields))
        network = VideoAlign.from_pretrained(copy, dtype=torch.float32).network
        assert network.config.text_config.vocab_size == 151

    def test_the_rate_and_the_size_of_the_checkpoint_count(self, copy: Path) -> None:
        data = SETTINGS["data_config"] | {"fps": 4.0, "max_frame_pixels": 120_000}
        (copy / "model_config.json").write_text(json.dumps(SETTINGS | {"data_config": data}))
        other = VideoAlign.from_pretrained(copy)
        assert (other.sampled_fps, other.max_pixels) == (4.0, 120_000)

    def test_the_tokenizer_may_lie_beside_the_weights(self, copy: Path) -> None:
        place = copy / "checkpoint-11352"
        shutil.move(place / "tokenizer" / "tokenizer.json", place / "tokenizer.json")
        assert VideoAlign.from_pretrained(copy).tokenizer.token_to_id("<|VQ_reward|>") == 144


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"mrope_section": 0}, "mrope_section to 0, expected three whole numbers .* add up to 8"),
        ({"mrope_section": [0, 4, 4]}, "expected three whole numbers of at least 1"),
        ({"mrope_section": [2, 3, 4]}, "add up to 8, half the channels of a head"),
        ({"mrope_section": [4, 4]}, "expected three whole numbers"),
        ({"mrope_section": [2, 3, 3], "rope_theta": 0}, "rope_theta to 0, expected a number above 0"),
    ],
)
def test_rotary_embeddings_that_do_not_fit_the_head(rope: dict, message: str) -> None:
    config = Qwen2VLConfig(
        hidden_size=64, num_attention_heads=4, rope_scaling={"type": "mrope", "rope_theta": 1e6} | rope
    )
    with pytest.raises(ValueError, match=message):
        check_rope(config, Path("config.json"), "fetch it again")
