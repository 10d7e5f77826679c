"""MPS against the authors' code on tiny weights, loaded from a folder in the published layout."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videos import noise
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import CLIPConfig

from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.mps import CARD, CONDITION, MPS, CrossSizes, MPSNetwork, kept_tokens

DATA = Path(__file__).parents[1] / "data" / "rewards" / "mps"
IO, WEIGHTS = load_file(DATA / "io.safetensors"), load_file(DATA / "weights.safetensors")
META, CONFIG = (json.loads((DATA / f"{name}.json").read_text()) for name in ("meta", "config"))
ATOL = META["tolerance"]["atol"]
END = 95


def words(ids: Tensor) -> str:
    """The text that the tiny tokenizer turns into these ids, a row without its start, end and padding."""
    return " ".join(f"w{index}" for index in ids.tolist()[1:] if index != END)


PROMPT, OTHER = words(IO["input_ids"][0]), "w3 w1 w4 w15"


def tiny_tokenizer() -> Tokenizer:
    """Words w0 to w93 for the ids of the random prompts, and the ids of the fixture for the condition."""
    vocabulary = {f"w{index}": index for index in range(94)} | {"<|startoftext|>": 94, "<|endoftext|>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.normalizer = normalizers.Replace(CONDITION, words(IO["condition_ids"][0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_checkpoint(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    fields = CONFIG["clip"] | {"cross_model": CONFIG["cross_model"]}
    (folder / "config.json").write_text(json.dumps(fields))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    torch.save(weights, folder / "MPS_overall.pth")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mps") / "tiny", WEIGHTS)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> MPS:
    return MPS.from_pretrained(folder)


def images(count: int, size: tuple[int, int] = (40, 56)) -> Tensor:
    return noise(count, *size, 3)


class TestNetwork:
    def test_condition_is_the_published_one(self) -> None:
        assert META["condition_overall"] == CONDITION
        assert CONFIG["published_cross_model"] == asdict(CrossSizes())

    def test_ids(self, scorer: MPS) -> None:
        ids = torch.cat([IO["condition_ids"], IO["input_ids"]])
        assert torch.equal(scorer.tokenizer([CONDITION, PROMPT]), ids)

    @pytest.mark.parametrize("threshold", ["0.01", "0.3"])
    def test_scores_of_normalised_pixels(self, folder: Path, threshold: str) -> None:
        scorer = MPS.from_pretrained(folder, threshold=float(threshold))
        tokens, _ = scorer.network.texts(torch.cat([IO["condition_ids"], IO["input_ids"]]))
        kept = kept_tokens(tokens[1:], tokens[0], float(threshold))[0]
        assert torch.equal(kept, IO[f"keep_mask_{threshold}"].bool())
        scores = scorer.scores(IO["pixel_values"], [PROMPT, PROMPT])
        torch.testing.assert_close(scores, IO[f"score_thr_{threshold}"], rtol=0, atol=ATOL)
        if threshold == "0.01":
            torch.testing.assert_close(scores.softmax(0), IO["probs_thr_0.01"], rtol=0, atol=ATOL)

    def test_gradient(self, scorer: MPS) -> None:
        """Gradients reach 0.95; measured is 1e-6."""
        pixels = IO["pixel_values"].clone().requires_grad_()
        scorer.scores(pixels, [PROMPT, PROMPT]).sum().backward()
        assert pixels.grad is not None
        torch.testing.assert_close(pixels.grad, IO["grad_pixel_values"], rtol=0, atol=1e-5)
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_published_size(self) -> None:
        text = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
        }
        vision = {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
        }
        config = CLIPConfig.from_dict(
            {"projection_dim": 1024, "text_config": text, "vision_config": vision | {"patch_size": 14}}
        )
        with torch.device("meta"):
            network = MPSNetwork(config, asdict(CrossSizes()))
        assert sum(weight.numel() for weight in network.parameters()) == CARD.parameters


class TestScores:
    def test_images_of_the_fixture(self, scorer: MPS) -> None:
        """Pixels of the model's own size are only normalised."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        levels = IO["pixel_values"] * std + mean
        found = scorer.score_image_pixels(levels, [PROMPT, PROMPT])
        torch.testing.assert_close(found, IO["score_thr_0.01"], rtol=0, atol=ATOL)

    def test_pixels_score_nearly_alike_and_take_a_gradient(self, scorer: MPS) -> None:
        batch = images(2)
        inputs = (batch.permute(0, 3, 1, 2).float() / 255).requires_grad_()
        found = scorer.score_image_pixels(inputs, [PROMPT, OTHER])
        torch.testing.assert_close(found, scorer.score_images(batch, [PROMPT, OTHER]), rtol=0, atol=0.2)
        found.sum().backward()
        assert inputs.grad is not None
        assert (inputs.grad.abs().amax((1, 2, 3)) > 0).all()

    def test_videos(self, scorer: MPS) -> None:
        videos = images(6).unflatten(0, (2, 3))
        found = VideoOfFrames(scorer).score(videos, [PROMPT, OTHER])["mps"]
        frames = scorer.score_images(videos.flatten(0, 1), [PROMPT] * 3 + [OTHER] * 3)
        torch.testing.assert_close(found, frames.view(2, 3).mean(1), rtol=0, atol=1e-4)
        pixels = videos.permute(0, 1, 4, 2, 3).float() / 255
        assert VideoOfFrames(scorer).score_pixels(pixels, [PROMPT, OTHER])["mps"].shape == (2,)

    def test_preprocessing_is_named(self, folder: Path, scorer: MPS) -> None:
        other = MPS.from_pretrained(folder, preprocessing="videox_fun")
        pair = [one.score_images(images(1), [PROMPT]) for one in (scorer, other)]
        assert not torch.equal(*pair)

    def test_bfloat16(self, scorer: MPS, folder: Path) -> None:
        half = MPS.from_pretrained(folder, dtype=torch.bfloat16)
        kinds = {name: weight.dtype for name, weight in half.network.named_parameters()}
        assert kinds.pop("model.logit_scale") == torch.float32
        assert set(kinds.values()) == {torch.bfloat16}
        ours, exact = (one.score_images(images(4), [PROMPT] * 4) for one in (half, scorer))
        torch.testing.assert_close(ours, exact, rtol=0, atol=1.0)


class TestLoading:
    def test_positions_that_older_versions_saved(self, scorer: MPS, tmp_path: Path) -> None:
        weights = dict(WEIGHTS)
        weights["model.text_model.embeddings.position_ids"] = torch.arange(20).unsqueeze(0)
        other = MPS.from_pretrained(write_checkpoint(tmp_path / "old", weights))
        pair = [one.score_images(images(1), [PROMPT]) for one in (scorer, other)]
        assert torch.equal(*pair)

    @pytest.mark.parametrize("name", ["MPS_overall.safetensors", "model.safetensors"])
    def test_safetensors(self, scorer: MPS, copy: Path, name: str) -> None:
        save_file(WEIGHTS, copy / name)
        if name == "model.safetensors":
            (copy / "MPS_overall.pth").unlink()
        other = MPS.from_pretrained(str(copy))
        pair = [one.score_images(images(1), [PROMPT]) for one in (scorer, other)]
        assert torch.equal(*pair)

    def test_the_authors_pickled_module(self, copy: Path) -> None:
        torch.save(torch.nn.Linear(2, 2), copy / "MPS_overall.pth")
        with pytest.raises(
            ValueError, match=r"cannot be read .*whole pickled module, is not read: MPS needs"
        ):
            MPS.from_pretrained(copy)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("config.json", "no config.json in"),
            ("tokenizer.json", "no tokenizer.json or"),
            ("MPS_overall.pth", "no weight file in"),
        ],
    )
    def test_missing_file(self, copy: Path, name: str, message: str) -> None:
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{re.escape(message)}.*MPS needs a local folder"):
            MPS.from_pretrained(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "blip"}, "has model_type 'blip', expected 'clip'"),
            (
                {"text_config": CONFIG["clip"]["text_config"] | {"eos_token_id": 7}},
                "ends texts with 95, config.json with 7",
            ),
            (
                {"text_config": CONFIG["clip"]["text_config"] | {"vocab_size": 90}},
                "has 96 tokens for 90 embeddings",
            ),
        ],
    )
    def test_wrong_settings(self, copy: Path, change: dict, message: str) -> None:
        fields = json.loads((copy / "config.json").read_text()) | change
        (copy / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=re.escape(message)):
            MPS.from_pretrained(copy)

    def test_wrong_options(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="threshold is 1, expected at least 0 and less than 1"):
            MPS.from_pretrained(folder, threshold=1)
        with pytest.raises(ValueError, match="preprocessing is 'clop', expected one of"):
            MPS.from_pretrained(folder, preprocessing="clop")
