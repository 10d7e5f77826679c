"""LAION's aesthetic predictor: the published head, and the whole of a tiny one, against the authors' code."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videos import noise
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from vpo_engine.rewards.frames import VideoOfFrames
from vpo_engine.rewards.laion_aesthetic import CARD, HEAD, LaionAesthetic, read_head

DATA = Path(__file__).parents[1] / "data" / "rewards" / "laion_aesthetic"
TINY, PUBLISHED = DATA / "tiny_end_to_end", DATA / "weights" / f"{HEAD}.pth"
IO, REAL = load_file(TINY / "io.safetensors"), load_file(DATA / "real_mlp" / "io.safetensors")
ATOL = 1e-5
"""The fixtures state 1e-4 for the tiny model, 2e-5 for the head on scores near 5; measured 1e-6."""


def write_checkpoint(folder: Path, head: str = "pth") -> Path:
    """As published: a whole CLIP, text tower and all, with the head beside it."""
    folder.mkdir(parents=True)
    config = json.loads((TINY / "config.json").read_text())["clip"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(CLIPModel(CLIPConfig.from_dict(config)).state_dict())
    stored = load_file(TINY / "weights.safetensors")
    weights |= {key[len("clip.") :]: weight for key, weight in stored.items() if key.startswith("clip.")}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    save_file(weights, folder / "model.safetensors")
    mlp = {key[len("mlp.") :]: weight for key, weight in stored.items() if key.startswith("mlp.")}
    path = folder / f"{HEAD}.{head}"
    if head == "pth":
        torch.save(mlp, path)
    else:
        save_file(mlp, path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("aesthetic") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> LaionAesthetic:
    return LaionAesthetic.from_pretrained(folder)


class TestPublishedHead:
    """Its real weights, which lie with the tests."""

    def test_scores(self) -> None:
        head = read_head(PUBLISHED.parent, 768)
        torch.testing.assert_close(head(REAL["normalized"]), REAL["score"], rtol=0, atol=ATOL)
        torch.testing.assert_close(
            torch.nn.functional.normalize(REAL["embedding"], dim=1), REAL["normalized"], rtol=0, atol=1e-6
        )

    def test_is_one_affine_map(self) -> None:
        head = read_head(PUBLISHED.parent, 768).double()
        zero = torch.zeros(1, 768, dtype=torch.float64)
        torch.testing.assert_close(head(zero).float(), REAL["affine.bias"], rtol=0, atol=ATOL)
        slope = head(torch.eye(768, dtype=torch.float64)) - head(zero)
        torch.testing.assert_close(slope.float(), REAL["affine.weight"][0], rtol=1e-4, atol=ATOL)

    def test_behind_an_image_tower_of_its_width(self, tmp_path: Path) -> None:
        config = CLIPConfig.from_dict(json.loads((TINY / "config.json").read_text())["clip"])
        config.projection_dim = config.vision_config.projection_dim = config.text_config.projection_dim = 768
        clip = CLIPModel(config)
        clip.save_pretrained(tmp_path)
        shutil.copy(PUBLISHED, tmp_path)
        scorer, images = LaionAesthetic.from_pretrained(tmp_path), noise(3, 30, 44, 3)
        features = clip.eval().get_image_features(scorer.preprocess(images)).pooler_output.detach()
        unit = features / features.norm(dim=1, keepdim=True)
        expected = (unit @ REAL["affine.weight"].T + REAL["affine.bias"]).squeeze(1)
        torch.testing.assert_close(scorer.score_images(images, [""] * 3), expected, rtol=0, atol=2e-5)

    def test_other_widths_than_the_towers(self) -> None:
        message = (
            f"{HEAD}.pth is not a checkpoint of LAION's aesthetic predictor, 1 weights disagree: layers.0"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            read_head(PUBLISHED.parent, 512)


class TestScores:
    def test_scores(self, scorer: LaionAesthetic) -> None:
        found = scorer.scores(IO["pixel_values"], [""] * 4)
        torch.testing.assert_close(found, IO["score"], rtol=0, atol=ATOL)

    def test_gradient(self, scorer: LaionAesthetic) -> None:
        pixels = IO["pixel_values"].clone().requires_grad_()
        scorer.scores(pixels, [""] * 4).sum().backward()
        torch.testing.assert_close(pixels.grad, IO["grad_pixel_values"], rtol=1e-4, atol=1e-6)
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_videos(self, scorer: LaionAesthetic) -> None:
        videos = noise(2, 5, 30, 44, 3)
        scores = VideoOfFrames(scorer, frames=2).score(videos, ["", "a"])
        assert tuple(scores) == tuple(CARD.dimensions)
        one = torch.stack([scorer.score_images(video[[1, 3]], [""] * 2).mean() for video in videos])
        torch.testing.assert_close(scores["aesthetic"], one, rtol=0, atol=ATOL)


class TestLoading:
    def test_safetensors_of_the_head(self, scorer: LaionAesthetic, tmp_path: Path) -> None:
        other = LaionAesthetic.from_pretrained(write_checkpoint(tmp_path / "a", "safetensors"))
        images = noise(2, 30, 44, 3)
        assert torch.equal(other.score_images(images, ["", ""]), scorer.score_images(images, ["", ""]))

    def test_bfloat16_keeps_a_float32_head(self, folder: Path) -> None:
        scorer = LaionAesthetic.from_pretrained(folder, dtype=torch.bfloat16)
        assert {weight.dtype for weight in scorer.network.mlp.parameters()} == {torch.float32}
        assert {weight.dtype for weight in scorer.network.clip.parameters()} == {torch.bfloat16}
        found = scorer.scores(IO["pixel_values"], [""] * 4)
        torch.testing.assert_close(found, IO["score"], rtol=0, atol=0.05)

    def test_published_size_is_the_cards(self) -> None:
        config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=24,
            patch_size=14,
            projection_dim=768,
        )
        with torch.device("meta"):
            clip = CLIPVisionModelWithProjection(config)
        head = read_head(PUBLISHED.parent, 768)
        found = sum(weight.numel() for module in (clip, head) for weight in module.parameters())
        assert found == CARD.parameters

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", f"{HEAD}.pth"])
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        message = "weight file" if name == "model.safetensors" else name
        with pytest.raises(FileNotFoundError, match=rf"no {re.escape(message)} in .*improved-aesthetic"):
            LaionAesthetic.from_pretrained(copy)

    def test_the_head_with_relus(self, copy: Path) -> None:
        """ava+logos-l14-reluMSE.pth has its layers at 0, 3, 6, 9 and 11."""
        mlp = torch.load(copy / f"{HEAD}.pth", weights_only=True)
        moved = {"0": "0", "2": "3", "4": "6", "6": "9", "7": "11"}
        torch.save(
            {f"layers.{moved[key.split('.')[1]]}.{key.split('.')[2]}": weight for key, weight in mlp.items()},
            copy / f"{HEAD}.pth",
        )
        with pytest.raises(ValueError, match=r"LAION's aesthetic predictor, \d+ weights disagree: missing"):
            LaionAesthetic.from_pretrained(copy)

    def test_another_model(self, copy: Path) -> None:
        weights = load_file(copy / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, copy / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"of CLIP, 1 weights disagree: missing visual_projection\.weight"
        ):
            LaionAesthetic.from_pretrained(copy)
        (copy / "config.json").write_text('{"model_type": "siglip"}')
        with pytest.raises(ValueError, match="has model_type 'siglip', expected 'clip'"):
            LaionAesthetic.from_pretrained(copy)
