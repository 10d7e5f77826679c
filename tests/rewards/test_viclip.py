"""ViCLIP against the authors' code on tiny weights, loaded as the published checkpoint is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import spelled, write_words
from tiny_videos import noise, pixels
from torch import Tensor
from torch.nn.functional import normalize

from vpo_engine.rewards.clip import ClipTokenizer
from vpo_engine.rewards.imagenet import square_clips
from vpo_engine.rewards.viclip import CARD, ViCLIP, ViCLIPNetwork, ViCLIPShape, frame_indices

DATA = Path(__file__).parents[1] / "data" / "rewards" / "viclip"
IO, WEIGHTS = load_file(DATA / "io.safetensors"), load_file(DATA / "weights.safetensors")
META = json.loads((DATA / "meta.json").read_text())
ATOL = META["tolerance"]["atol"]
TINY = ViCLIPShape(
    embed_dim=16,
    image_size=21,
    patch_size=7,
    vision_width=24,
    vision_layers=2,
    vision_heads=3,
    vocab_size=96,
    text_width=24,
    text_layers=2,
    text_heads=3,
)
PROMPTS = spelled(IO["input_ids"])
NAME = "ViClip-InternVid-10M-FLT"


def write_checkpoint(folder: Path, weights: dict[str, Tensor]) -> Path:
    """One pickle with the weights under "model", and a tokenizer that spells the fixture's ids."""
    folder.mkdir()
    write_words(folder / "tokenizer.json")
    torch.save({"model": weights}, folder / f"{NAME}.pth")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("viclip") / "tiny", WEIGHTS)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ViCLIP:
    return ViCLIP.from_pretrained(folder, shape=TINY)


def videos(count: int, frames: int = 8, size: tuple[int, int] = (30, 44)) -> Tensor:
    return noise(count, frames, *size, 3)


class TestNetwork:
    def test_features(self, scorer: ViCLIP) -> None:
        clips = IO["pixel_values_btchw"]
        network = scorer.network
        found = {
            "video_features": network.vision_encoder(clips),
            "text_features": network.text_encoder(IO["input_ids"].long()),
            "single_frame_features": network.vision_encoder(clips[:, :1]),
        }
        for name, features in found.items():
            torch.testing.assert_close(normalize(features, dim=-1), IO[name], rtol=0, atol=ATOL)

    def test_scores_and_their_gradient(self, scorer: ViCLIP) -> None:
        """Gradients reach 3e-3; measured is 2e-9."""
        clips = IO["pixel_values_btchw"].clone().requires_grad_()
        scores = scorer.scores(clips, PROMPTS)
        torch.testing.assert_close(scores, IO["score"], rtol=0, atol=ATOL)
        scores.sum().backward()
        assert clips.grad is not None
        torch.testing.assert_close(clips.grad[..., ::2, ::2], IO["grad_pixel_values"], rtol=0, atol=1e-8)
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_ids(self, scorer: ViCLIP) -> None:
        assert torch.equal(scorer.tokenizer(PROMPTS), IO["input_ids"].long())

    def test_ids_of_the_published_vocabulary(self) -> None:
        """tokenizer.json holds, of OpenAI's byte pairs, those that the two texts are merged from."""
        tokenizer = ClipTokenizer.from_folder(DATA, "remedy", length=32, pad=0, clean=True)
        assert torch.equal(tokenizer(META["tokenizer_texts"]), IO["real_tokenizer_ids_32"].long())

    def test_published_size(self) -> None:
        with torch.device("meta"):
            network = ViCLIPNetwork(ViCLIPShape())
        assert sum(weight.numel() for weight in network.parameters()) == CARD.parameters


class TestFrames:
    @pytest.mark.parametrize(("count", "step"), [(8, 1), (15, 1), (16, 2), (34, 4), (51, 6)])
    def test_indices(self, count: int, step: int) -> None:
        assert frame_indices(count, 8) == [step * index for index in range(8)]
        drawn = {tuple(frame_indices(count, 8, torch.Generator().manual_seed(seed))) for seed in range(60)}
        assert drawn == {tuple(first + step * index for index in range(8)) for first in range(step)}

    def test_too_few(self, scorer: ViCLIP) -> None:
        message = "videos have 7 frames, but ViCLIP reads 8; give it at least 8"
        with pytest.raises(ValueError, match=message):
            scorer.score(videos(2, 7), PROMPTS)
        with pytest.raises(ValueError, match=message):
            scorer.score_pixels(pixels(videos(2, 7)), PROMPTS)

    def test_middle_of_the_long_side(self) -> None:
        """Of the model's own height nothing is resized; columns 5 to 25 of 32 remain."""
        frames = pixels(videos(1, 2, (21, 32)))
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        expected = (frames[..., 5:26] - mean) / std
        torch.testing.assert_close(square_clips(frames, 21, "bicubic"), expected, rtol=0, atol=1e-6)
        turned = square_clips(frames.transpose(-1, -2), 21, "bicubic").transpose(-1, -2)
        torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)

    def test_drawn_crops(self) -> None:
        frames = pixels(videos(1, 2, (21, 24)))
        drawn = [
            square_clips(frames, 21, "bicubic", torch.Generator().manual_seed(seed)) for seed in range(30)
        ]
        assert len({float(clip.sum()) for clip in drawn}) == 4
        assert torch.equal(drawn[0], square_clips(frames, 21, "bicubic", torch.Generator().manual_seed(0)))

    @pytest.mark.parametrize("size", [(30, 44), (21, 21), (90, 33), (9, 50)])
    def test_any_size(self, scorer: ViCLIP, size: tuple[int, int]) -> None:
        grey = scorer.preprocess(torch.full((1, 8, 3, *size), 0.5))
        assert grey.shape == (1, 8, 3, 21, 21)
        expected = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225])
        torch.testing.assert_close(grey, expected.view(3, 1, 1).expand_as(grey), rtol=0, atol=1e-5)


class TestScores:
    def test_is_the_score_of_the_chosen_frames(self, scorer: ViCLIP) -> None:
        clips = videos(2, 17)
        expected = scorer.scores(scorer.preprocess(pixels(clips[:, 0:16:2])), PROMPTS)
        torch.testing.assert_close(scorer.score(clips, PROMPTS)["viclip"], expected, rtol=0, atol=1e-6)

    def test_order_of_frames_counts(self, scorer: ViCLIP) -> None:
        clips = videos(2)
        pair = [scorer.score(each, PROMPTS)["viclip"] for each in (clips, clips.flip(1))]
        assert not torch.equal(*pair)

    def test_pixels_score_alike_and_take_a_gradient(self, scorer: ViCLIP) -> None:
        clips = videos(2, 16)
        inputs = pixels(clips).requires_grad_()
        found = scorer.score_pixels(inputs, PROMPTS)["viclip"]
        expected = scorer.score(clips, PROMPTS)["viclip"]
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)
        found.sum().backward()
        assert inputs.grad is not None
        reached = inputs.grad.abs().amax((0, 2, 3, 4))
        assert (reached[::2] > 0).all()
        assert (reached[1::2] == 0).all()
        with torch.no_grad():
            better = scorer.score_pixels(inputs + inputs.grad, PROMPTS)["viclip"]
        assert (better > expected).all()

    def test_a_generator_draws_crop_and_first_frame(self, scorer: ViCLIP) -> None:
        inputs = pixels(videos(2, 16))

        def drawn(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return scorer.score_pixels(inputs, PROMPTS, generator)["viclip"]

        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))

    def test_bfloat16(self, scorer: ViCLIP, folder: Path) -> None:
        half = ViCLIP.from_pretrained(folder, dtype=torch.bfloat16, shape=TINY)
        assert {weight.dtype for weight in half.network.parameters()} == {torch.bfloat16}
        ours, exact = (one.score(videos(2), PROMPTS)["viclip"] for one in (half, scorer))
        torch.testing.assert_close(ours, exact, rtol=0, atol=0.02)


class TestLoading:
    @pytest.mark.parametrize("name", [f"{NAME}.safetensors", "model.safetensors"])
    def test_safetensors_are_preferred(self, scorer: ViCLIP, copy: Path, name: str) -> None:
        save_file(WEIGHTS, copy / name)
        (copy / f"{NAME}.pth").write_bytes(b"no pickle")
        other = ViCLIP.from_pretrained(str(copy), shape=TINY)
        pair = [one.score(videos(2), PROMPTS)["viclip"] for one in (other, scorer)]
        assert torch.equal(*pair)

    def test_missing_files(self, copy: Path) -> None:
        (copy / f"{NAME}.pth").unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {NAME}\.pth in .*ViCLIP needs"):
            ViCLIP.from_pretrained(copy, shape=TINY)
        (copy / "tokenizer.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or bpe_simple_vocab.*ViCLIP needs"):
            ViCLIP.from_pretrained(copy, shape=TINY)

    def test_not_a_checkpoint(self, copy: Path) -> None:
        torch.save(WEIGHTS, copy / f"{NAME}.pth")
        with pytest.raises(ValueError, match=rf'{NAME}\.pth holds no "model"; ViCLIP needs'):
            ViCLIP.from_pretrained(copy, shape=TINY)

    def test_another_size(self, copy: Path) -> None:
        with pytest.raises(
            ValueError, match=r"not a checkpoint of ViCLIP, \d+ weights disagree: missing vision"
        ):
            ViCLIP.from_pretrained(copy)
        write_words(copy / "tokenizer.json", 100)
        with pytest.raises(ValueError, match="has 100 tokens for 96 embeddings"):
            ViCLIP.from_pretrained(copy, shape=TINY)
