"""Test the inputs of CLIP models, pixels of every convention and text, against the public code."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vpo_engine.rewards.clip import CONVENTIONS, ClipTokenizer, ImagePreprocessor, encode_once, paired_cosine

DATA = Path(__file__).parents[1] / "data" / "rewards"
SMALL, LARGE = (
    load_file(DATA / name / "io.safetensors") for name in ("preprocess_clip", "preprocess_clip_224")
)
PUBLIC = {
    "clip": "openai_clip_pil",
    "clip_tensor": "shortside_bicubic_centercrop_tensor",
    "hpsv2": "hpsv2_letterbox",
    "hpsv2_no_antialias": "hpsv2_letterbox_noantialias",
    "vader": "vader_squash_bilinear",
    "videox_fun": "videoxfun_squash_bicubic",
    "instructvideo": "instructvideo_shortside_bilinear_nocrop",
}
"""Our names and those of the recorded outputs; clip_hf is compared with transformers itself."""
TOKENS = DATA / "clip_tokenizer"
TEXTS = json.loads((TOKENS / "meta.json").read_text())["texts"]
IDS = load_file(TOKENS / "ids.safetensors")["ids"]


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


class TestPixels:
    @pytest.mark.parametrize("name", PUBLIC)
    @pytest.mark.parametrize("image", ["a", "b"])
    def test_bytes_equal_the_public_codes(self, name: str, image: str) -> None:
        found = ImagePreprocessor.named(name, 24)(SMALL[f"{image}.frame"][None])
        torch.testing.assert_close(found[0], SMALL[f"{image}.{PUBLIC[name]}"], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["clip", "hpsv2"])
    def test_at_the_published_size(self, name: str) -> None:
        found = ImagePreprocessor.named(name, 224)(LARGE["frame"][None])
        assert found.shape == (1, 3, 224, 224)
        probe = LARGE[f"{PUBLIC[name]}.val"]
        torch.testing.assert_close(found.flatten()[LARGE[f"{PUBLIC[name]}.idx"]], probe, rtol=0, atol=1e-6)
        wide = found.double()
        stat = torch.stack([wide.mean(), wide.std(), wide.abs().sum(), wide.min(), wide.max()])
        torch.testing.assert_close(stat, LARGE[f"{PUBLIC[name]}.stat"], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("size", [(60, 107), (224, 399), (300, 171), (57, 100), (33, 31), (224, 224)])
    def test_transformers_crop_bit_for_bit(self, size: tuple[int, int]) -> None:
        images = noise(2, *size, 3)
        theirs = CLIPImageProcessorPil()(list(images.numpy()), return_tensors="pt")["pixel_values"]
        assert torch.equal(ImagePreprocessor.named("clip_hf", 224)(images), theirs)

    def test_odd_margins_are_where_the_two_crops_differ(self) -> None:
        for width, same in ((399, False), (398, True)):
            pair = [
                ImagePreprocessor.named(name, 224)(noise(1, 224, width, 3)) for name in ("clip", "clip_hf")
            ]
            assert torch.equal(*pair) is same

    @pytest.mark.parametrize("name", CONVENTIONS)
    def test_float_pixels_agree_with_bytes_and_pass_gradients(self, name: str) -> None:
        """Exactly without PIL; with it up to the rounding to bytes and its clamping of overshoots."""
        preprocess = ImagePreprocessor.named(name, 24)
        images = SMALL["a.frame"][None]
        pixels = (images.permute(0, 3, 1, 2).float() / 255).requires_grad_()
        found, expected = preprocess.pixels(pixels), preprocess(images)
        difference = (found - expected).abs()
        if CONVENTIONS[name].pil:
            assert difference.median() < 0.01
            assert difference.mean() < 0.02
        else:
            assert torch.equal(found.detach(), expected)
        found.sum().backward()
        assert pixels.grad is not None
        assert pixels.grad.isfinite().all()
        assert (pixels.grad != 0).float().mean() > (0.1 if "no_antialias" in name else 0.5)

    def test_letterbox_pads_with_black(self) -> None:
        for shape, edge in (((10, 40), np.s_[:, :, 0]), ((40, 10), np.s_[:, :, :, 0])):
            white = torch.full((1, *shape, 3), 255, dtype=torch.uint8)
            border = ImagePreprocessor.named("hpsv2", 24)(white)[edge]
            black = ImagePreprocessor.named("hpsv2", 24)(torch.zeros_like(white))[edge]
            assert torch.equal(border, black)

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"preprocessing is 'crop', expected one of clip, clip_hf, "):
            ImagePreprocessor.named("crop", 224)


class TestText:
    @pytest.fixture
    def tokenizer(self) -> ClipTokenizer:
        return ClipTokenizer.from_folder(TOKENS, "remedy", pad=0, clean=True)

    def test_ids_equal_the_public_codes(self, tokenizer: ClipTokenizer) -> None:
        """Among them no text, text that is cut off, HTML entities and mis-decoded Unicode."""
        assert torch.equal(tokenizer(TEXTS), IDS)
        assert len(tokenizer) == 49408

    def test_padding_with_the_end_token_and_another_length(self) -> None:
        rows = ClipTokenizer.from_folder(TOKENS, "remedy", length=32)([TEXTS[0], TEXTS[3]])
        ended = IDS[[0, 3], :32].clone()
        ended[0][ended[0] == 0] = 49407
        ended[1][-1] = 49407
        assert torch.equal(rows, ended)

    def test_cleaning_is_a_choice(self) -> None:
        plain = ClipTokenizer.from_folder(TOKENS, "remedy", pad=0)
        assert torch.equal(plain(TEXTS[:2]), IDS[:2])
        assert not torch.equal(plain([TEXTS[4]])[0], IDS[4])

    def test_openais_list_of_merges(self, tmp_path: Path) -> None:
        """Ids are places: 256 bytes, 256 bytes that end a word, merges in order, start, end."""
        merges = ["#version", "c a", "ca t</w>", "t h", "th e</w>", ""]
        (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode()))
        tokenizer = ClipTokenizer.from_folder(tmp_path, "remedy", length=8)
        t, s_ends = ord("t") - ord("!"), 256 + ord("s") - ord("!")
        assert tokenizer(["The cat"]).tolist() == [[516, 515, 513, 517, 517, 517, 517, 517]]
        assert tokenizer(["The cats"]).tolist() == [[516, 515, 512, t, s_ends, 517, 517, 517]]
        assert len(tokenizer) == 518

    @pytest.mark.parametrize("token", ["<|startoftext|>", "<|endoftext|>", "<|EndOfText|>"])
    def test_special_token_in_a_prompt(self, tokenizer: ClipTokenizer, token: str) -> None:
        with pytest.raises(
            ValueError, match=re.escape(f"contains '{token.lower()}', which CLIP's tokenizer")
        ):
            tokenizer([f"a cat {token}"])

    def test_missing_and_damaged_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or bpe_simple_vocab.*; remedy"):
            ClipTokenizer.from_folder(tmp_path, "remedy")
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used \(.*remedy"):
            ClipTokenizer.from_folder(tmp_path, "remedy")

    def test_another_models_tokenizer(self) -> None:
        with pytest.raises(ValueError, match=r"no <\|startoftext\|> and <\|endoftext\|>.*; remedy"):
            ClipTokenizer.from_folder(DATA / "videoscore" / "tokenizer", "remedy")

    def test_special_token_that_cleaning_makes(self, tokenizer: ClipTokenizer) -> None:
        prompt = "a cat &lt;|endoftext|&gt; in the snow"
        with pytest.raises(ValueError, match=re.escape("contains '<|endoftext|>', which CLIP's tokenizer")):
            tokenizer([prompt])
        plain = ClipTokenizer.from_folder(TOKENS, "remedy", pad=0)
        assert int((plain([prompt]) == plain.end).sum()) == 1


def test_each_text_is_encoded_once() -> None:
    seen: list[list[str]] = []

    def encode(texts: list[str]) -> Tensor:
        seen.append(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    features = encode_once(["aa", "b", "aa"], encode)
    assert seen == [["aa", "b"]]
    assert features.tolist() == [[2.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    torch.testing.assert_close(paired_cosine(features, features.bfloat16()), torch.ones(3))
