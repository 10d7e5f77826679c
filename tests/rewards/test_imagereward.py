"""ImageReward against the authors' code on tiny weights, loaded as the published checkpoint is."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videos import noise
from tokenizers import BertWordPieceTokenizer
from transformers import BlipTextConfig

from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.imagereward import CARD, ImageReward, ImageRewardNetwork, VisionShape

TINY = Path(__file__).parents[1] / "data" / "rewards" / "imagereward" / "tiny_model"
IO, META = load_file(TINY / "io.safetensors"), json.loads((TINY / "meta.json").read_text())
SIZES = json.loads((TINY / "config.json").read_text())
SHAPE = VisionShape(
    image_size=SIZES["vit"]["img_size"],
    patch_size=SIZES["vit"]["patch_size"],
    width=SIZES["vit"]["embed_dim"],
    layers=SIZES["vit"]["depth"],
    heads=SIZES["vit"]["num_heads"],
    head=tuple(SIZES["mlp_dims"][1:]),
)
TEXTS = META["texts"]
ATOL = 1e-6
"""The fixtures state 1e-4; measured 1e-7."""


def write_checkpoint(folder: Path, suffix: str = "pt") -> Path:
    folder.mkdir(parents=True)
    added = META["added_tokens"]
    words = [*META["vocab"], added["bos"], *added["additional"]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "med_config.json").write_text(json.dumps(SIZES["med"]))
    weights = load_file(TINY / "weights.safetensors")
    if suffix == "pt":
        torch.save(weights, folder / "ImageReward.pt")
    else:
        save_file(weights, folder / "ImageReward.safetensors")
    return folder


def load(folder: Path, **settings: object) -> ImageReward:
    return ImageReward.from_pretrained(folder, shape=SHAPE, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("imagereward") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ImageReward:
    return load(folder)


class TestText:
    def test_ids_and_mask(self, scorer: ImageReward) -> None:
        ids, mask = scorer.encode(TEXTS)
        assert torch.equal(ids, IO["input_ids"])
        assert torch.equal(mask, IO["attention_mask"])

    def test_case_accents_and_unknown_words(self, scorer: ImageReward) -> None:
        ids, mask = scorer.encode(["The RED Cár zebra"])
        assert ids[0, :6].tolist() == [2, 6, 14, 15, 1, 3]
        assert mask.sum() == 6

    def test_long_texts_keep_the_end(self, scorer: ImageReward) -> None:
        ids, mask = scorer.encode(["cat " * 50])
        assert ids.tolist() == [[2, *[7] * 33, 3]]
        assert mask.sum() == 35

    def test_tokenizer_json(self, scorer: ImageReward, copy: Path) -> None:
        """As transformers saves it, with its own start and end, length and padding."""
        words = BertWordPieceTokenizer(str(copy / "vocab.txt"), lowercase=True)
        words.enable_truncation(5)
        words.enable_padding(length=9)
        words.save(str(copy / "tokenizer.json"))
        (copy / "vocab.txt").unlink()
        for found, expected in zip(load(copy).encode(TEXTS), scorer.encode(TEXTS), strict=True):
            assert torch.equal(found, expected)


class TestScores:
    def test_scores(self, scorer: ImageReward) -> None:
        found = scorer.scores(IO["pixel_values"], TEXTS)
        torch.testing.assert_close(found, IO["reward"][:, 0], rtol=0, atol=ATOL)
        shifted = -torch.relu(2 - found)
        torch.testing.assert_close(shifted, IO["t2v_turbo_reward"], rtol=0, atol=ATOL)

    def test_what_the_text_attends_to(self, scorer: ImageReward) -> None:
        seen = scorer.network.blip.visual_encoder(IO["pixel_values"])
        torch.testing.assert_close(seen, IO["visual_embeds"], rtol=0, atol=5e-6)

    def test_gradient(self, scorer: ImageReward) -> None:
        pixels = IO["pixel_values"].clone().requires_grad_()
        scorer.scores(pixels, TEXTS).sum().backward()
        torch.testing.assert_close(pixels.grad, IO["grad_pixel_values"], rtol=1e-3, atol=1e-8)
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_videos(self, scorer: ImageReward) -> None:
        videos = noise(2, 3, 30, 44, 3)
        scores = VideoOfFrames(scorer, batch_size=4).score(videos, TEXTS)
        assert tuple(scores) == tuple(CARD.dimensions)
        one = torch.stack([scorer.score_images(videos[row], [TEXTS[row]] * 3).mean() for row in range(2)])
        torch.testing.assert_close(scores["imagereward"], one, rtol=0, atol=ATOL)


class TestLoading:
    def test_safetensors_come_first(self, scorer: ImageReward, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "a", "safetensors")
        (other / "ImageReward.pt").write_bytes(b"damaged")
        images = noise(2, 30, 44, 3)
        assert torch.equal(load(other).score_images(images, TEXTS), scorer.score_images(images, TEXTS))

    def test_bfloat16_keeps_a_float32_head(self, folder: Path) -> None:
        scorer = load(folder, dtype=torch.bfloat16)
        published = load_file(TINY / "weights.safetensors")
        for name, weight in scorer.network.mlp.state_dict().items():
            assert torch.equal(weight, published[f"mlp.{name}"])
        assert {weight.dtype for weight in scorer.network.blip.parameters()} == {torch.bfloat16}
        found = scorer.scores(IO["pixel_values"], TEXTS)
        torch.testing.assert_close(found, IO["reward"][:, 0], rtol=0, atol=0.01)

    def test_published_size_is_the_cards(self) -> None:
        text = BlipTextConfig(
            vocab_size=30524,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
            encoder_hidden_size=1024,
            is_decoder=True,
        )
        with torch.device("meta"):
            network = ImageRewardNetwork(VisionShape(), text)
        assert sum(weight.numel() for weight in network.parameters()) == CARD.parameters

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("med_config.json", "med_config.json"),
            ("ImageReward.pt", "ImageReward.pt"),
            ("vocab.txt", "tokenizer.json or vocab.txt"),
        ],
    )
    def test_missing_file(self, copy: Path, name: str, wanted: str) -> None:
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {wanted} in .*THUDM/ImageReward"):
            load(copy)

    def test_another_models_weights(self, copy: Path) -> None:
        weights = load_file(TINY / "weights.safetensors")
        del weights["mlp.layers.7.bias"]
        weights["blip.itm_head.bias"] = torch.zeros(2)
        torch.save(weights, copy / "ImageReward.pt")
        message = (
            "checkpoint of ImageReward, 2 weights disagree: missing mlp.layers.7.bias; unexpected blip.itm"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            load(copy)

    def test_published_size_is_the_default(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"is not a checkpoint of ImageReward, \d+ weights disagree"):
            ImageReward.from_pretrained(folder)

    def test_settings_that_do_not_fit(self, copy: Path) -> None:
        fields = SIZES["med"] | {"vocab_size": 20}
        (copy / "med_config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="has 28 tokens for 20 embeddings"):
            load(copy)
        del fields["hidden_size"]
        (copy / "med_config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"med_config\.json has no hidden_size; ImageReward needs"):
            load(copy)
        (copy / "vocab.txt").write_text("a\n[UNK]\n")
        (copy / "med_config.json").write_text(json.dumps(SIZES["med"]))
        with pytest.raises(ValueError, match=r"has no \[CLS\] and \[SEP\]"):
            load(copy)
