"""HPSv2 against the package's code on tiny weights, loaded as the published checkpoints are."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import spelled, write_words
from tiny_videos import noise

from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.hpsv2 import CARD, ClipShape, HPSv2, OpenClip

DATA = Path(__file__).parents[1] / "data" / "rewards"
TINY = DATA / "hpsv2" / "tiny_model"
IO = load_file(TINY / "io.safetensors")
SIZES = json.loads((TINY / "config.json").read_text())
SHAPE = ClipShape(
    embed_dim=SIZES["embed_dim"],
    image_size=SIZES["vision_cfg"]["image_size"],
    patch_size=SIZES["vision_cfg"]["patch_size"],
    vision_width=SIZES["vision_cfg"]["width"],
    vision_layers=SIZES["vision_cfg"]["layers"],
    vision_heads=SIZES["vision_cfg"]["width"] // SIZES["vision_cfg"]["head_width"],
    context_length=SIZES["text_cfg"]["context_length"],
    vocab_size=SIZES["text_cfg"]["vocab_size"],
    text_width=SIZES["text_cfg"]["width"],
    text_layers=SIZES["text_cfg"]["layers"],
    text_heads=SIZES["text_cfg"]["heads"],
)
PROMPTS = spelled(IO["input_ids"])
ATOL = 1e-6
"""The fixtures state 1e-5; measured 3e-7."""


def write_checkpoint(folder: Path, version: str = "v2.1", suffix: str = "pt") -> Path:
    folder.mkdir(parents=True)
    write_words(folder / "tokenizer.json")
    weights, path = load_file(TINY / "weights.safetensors"), folder / f"HPS_{version}_compressed.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    return folder


def load(folder: Path, **settings: object) -> HPSv2:
    return HPSv2.from_pretrained(folder, shape=SHAPE, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hpsv2") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> HPSv2:
    return load(folder)


class TestScores:
    def test_ids(self, scorer: HPSv2) -> None:
        assert torch.equal(scorer.tokenizer(PROMPTS), IO["input_ids"])

    def test_features(self, scorer: HPSv2) -> None:
        for found, name in (
            (scorer.network.image_features(IO["pixel_values"]), "image_features"),
            (scorer.network.text_features(IO["input_ids"]), "text_features"),
        ):
            expected = IO[name]
            found = found * expected.norm(dim=1, keepdim=True) / found.norm(dim=1, keepdim=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

    def test_scores(self, scorer: HPSv2) -> None:
        torch.testing.assert_close(scorer.scores(IO["pixel_values"], PROMPTS), IO["score"], rtol=0, atol=ATOL)

    def test_every_image_with_every_prompt(self, scorer: HPSv2) -> None:
        pairs = [scorer.scores(IO["pixel_values"], [prompt] * 3) for prompt in PROMPTS]
        torch.testing.assert_close(torch.stack(pairs, dim=1), IO["all_pairs"], rtol=0, atol=ATOL)

    def test_frames_of_a_video(self, scorer: HPSv2) -> None:
        found = scorer.scores(IO["video.pixel_values"], [PROMPTS[0]] * 4)
        torch.testing.assert_close(found, IO["video.frame_scores"], rtol=0, atol=ATOL)
        torch.testing.assert_close(found.mean(), IO["video.mean"], rtol=0, atol=ATOL)

    def test_gradient(self, scorer: HPSv2) -> None:
        pixels = IO["pixel_values"].clone().requires_grad_()
        scorer.scores(pixels, PROMPTS).sum().backward()
        torch.testing.assert_close(pixels.grad, IO["grad_pixel_values"], rtol=1e-4, atol=1e-7)
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_pixels_are_scored_as_bytes_are_and_get_gradients(self, scorer: HPSv2) -> None:
        """The package resizes floats itself, so there is no difference but rounding."""
        images = noise(3, 30, 44, 3)
        pixels = (images.permute(0, 3, 1, 2).float() / 255).requires_grad_()
        found = scorer.score_image_pixels(pixels, PROMPTS)
        torch.testing.assert_close(found.detach(), scorer.score_images(images, PROMPTS), rtol=0, atol=ATOL)
        found.sum().backward()
        assert pixels.grad is not None
        assert pixels.grad.abs().amin() > 0

    def test_videos(self, scorer: HPSv2) -> None:
        videos, prompts = noise(2, 5, 30, 44, 3), PROMPTS[:2]
        scores = VideoOfFrames(scorer, reduce="min", batch_size=3).score(videos, prompts)
        assert tuple(scores) == tuple(CARD.dimensions)
        one = torch.stack([scorer.score_images(videos[row], [prompts[row]] * 5).min() for row in range(2)])
        torch.testing.assert_close(scores["hpsv2"], one, rtol=0, atol=ATOL)

    def test_instructvideos_segments(self, scorer: HPSv2) -> None:
        """Gradients reach the drawn frames only."""
        videos = torch.rand(2, 9, 3, 28, 28, generator=torch.Generator().manual_seed(2)).requires_grad_()
        reward = VideoOfFrames(scorer, reduce="segments")
        scores = reward.score_pixels(videos, PROMPTS[:2], torch.Generator().manual_seed(4))["hpsv2"]
        (1 - scores).mean().backward()
        touched = videos.grad.abs().sum((2, 3, 4)) > 0
        assert [row.sum().item() for row in touched] == [4, 4]
        assert touched[:, :8].view(2, 4, 2).sum(2).tolist() == [[1] * 4] * 2


class TestPreprocessing:
    def test_the_packages_letterbox_is_the_default(self, scorer: HPSv2, folder: Path) -> None:
        images = noise(2, 30, 44, 3)
        default = scorer.score_images(images, PROMPTS[:2])
        named = load(folder, preprocessing="hpsv2").score_images(images, PROMPTS[:2])
        assert torch.equal(default, named)
        for name in ("hpsv2_no_antialias", "vader", "videox_fun", "clip"):
            other = load(folder, preprocessing=name).score_images(images, PROMPTS[:2])
            assert (other - default).abs().min() > 1e-4, name

    def test_frames_that_stay_oblong(self, folder: Path) -> None:
        scorer = load(folder, preprocessing="instructvideo")
        assert scorer.score_images(noise(1, 40, 40, 3), PROMPTS[:1]).isfinite().all()
        message = "preprocessed pixels have shape (1, 3, 28, 41), expected [B, 3, 28, 28]"
        with pytest.raises(ValueError, match=re.escape(message)):
            scorer.score_images(noise(1, 30, 44, 3), PROMPTS[:1])


class TestLoading:
    @pytest.mark.parametrize("version", ["v2", "v2.1"])
    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_versions_and_files(self, scorer: HPSv2, tmp_path: Path, version: str, suffix: str) -> None:
        other = load(write_checkpoint(tmp_path / "a", version, suffix), version=version)
        images = noise(3, 30, 44, 3)
        assert torch.equal(other.score_images(images, PROMPTS), scorer.score_images(images, PROMPTS))

    def test_safetensors_come_first(self, copy: Path) -> None:
        save_file(load_file(TINY / "weights.safetensors"), copy / "HPS_v2.1_compressed.safetensors")
        (copy / "HPS_v2.1_compressed.pt").write_bytes(b"damaged")
        load(copy)

    def test_half_precision_checkpoint_and_bfloat16(self, scorer: HPSv2, copy: Path) -> None:
        weights = {key: weight.half() for key, weight in load_file(TINY / "weights.safetensors").items()}
        torch.save({"state_dict": weights}, copy / "HPS_v2.1_compressed.pt")
        for dtype in (torch.float32, torch.bfloat16):
            other = load(copy, dtype=dtype)
            assert {weight.dtype for weight in other.network.parameters()} == {dtype}
            found = other.scores(IO["pixel_values"], PROMPTS)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, IO["score"], rtol=0, atol=0.02)

    def test_published_size_is_the_cards(self) -> None:
        with torch.device("meta"):
            network = OpenClip(ClipShape())
        assert sum(weight.numel() for weight in network.parameters()) == CARD.parameters

    @pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "tokenizer.json"])
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {re.escape(name)} .*in .*copy; .*xswu/HPSv2"):
            load(copy)

    def test_missing_version(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no HPS_v2_compressed\.pt in"):
            load(folder, version="v2")
        with pytest.raises(ValueError, match=r"version is 'v3', expected one of v2, v2\.1"):
            load(folder, version="v3")

    def test_other_content(self, copy: Path) -> None:
        path = copy / "HPS_v2.1_compressed.pt"
        weights = load_file(TINY / "weights.safetensors")
        torch.save(weights, path)
        with pytest.raises(ValueError, match='holds no "state_dict"'):
            load(copy)
        del weights["visual.proj"]
        torch.save({"state_dict": weights}, path)
        with pytest.raises(ValueError, match=r"not a checkpoint of HPSv2, 1 weights .*missing visual\.proj"):
            load(copy)
        path.write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"HPS_v2\.1_compressed\.pt cannot be read"):
            load(copy)

    def test_published_size_is_the_default(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"is not a checkpoint of HPSv2, \d+ weights disagree"):
            HPSv2.from_pretrained(folder)

    def test_tokenizer_of_another_model(self, copy: Path) -> None:
        shutil.copy(DATA / "clip_tokenizer" / "tokenizer.json", copy / "tokenizer.json")
        with pytest.raises(ValueError, match="has 49408 tokens for 96 embeddings"):
            load(copy)
