"""V-JEPA against the authors' code on tiny weights, loaded as the published checkpoints are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videos import noise, pixels
from torch import Tensor

from vpo_engine.rewards.vjepa import (
    BLOCKS,
    CARD,
    CHECKPOINTS,
    PARTS,
    VJepa,
    VJepaNetwork,
    draw_masks,
    frame_indices,
)

DATA = Path(__file__).parents[1] / "data" / "rewards" / "vjepa"
IO, WEIGHTS = load_file(DATA / "io.safetensors"), load_file(DATA / "weights.safetensors")
MASKS = [(IO[f"masks_enc.{index}"], IO[f"masks_pred.{index}"]) for index in range(2)]
ATOL = json.loads((DATA / "meta.json").read_text())["tolerance"]["atol"]
CAT = "a cat"


def write_checkpoint(folder: Path, weights: dict[str, Tensor]) -> Path:
    """The tiny model as the authors publish theirs: one pickle, with the optimizer's state and more beside it."""
    folder.mkdir()
    shutil.copy(DATA / "config.json", folder / "config.json")
    parts: dict = {part: {} for part in PARTS}
    for key, weight in weights.items():
        part, name = key.split(".", 1)
        parts[part][name] = weight
    rest = {"opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "scaler": None, "epoch": 300, "loss": 0.4}
    torch.save(parts | rest, folder / "vitl16.pth.tar")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vjepa") / "tiny", WEIGHTS)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> VJepa:
    return VJepa.from_pretrained(folder)


def clips(count: int, frames: int = 6, size: tuple[int, int] = (40, 56)) -> Tensor:
    return noise(count, frames, *size, 3)


class TestNetwork:
    def test_targets(self, scorer: VJepa) -> None:
        found = scorer.network.targets(IO["clip"])
        torch.testing.assert_close(found, IO["target_features_layernormed"], rtol=0, atol=ATOL)

    def test_predictions(self, scorer: VJepa) -> None:
        for index, found in enumerate(scorer.network.predictions(IO["clip"], MASKS)):
            torch.testing.assert_close(found, IO[f"z.{index}"], rtol=0, atol=ATOL)

    def test_loss(self, scorer: VJepa) -> None:
        losses = scorer.network(IO["clip"], MASKS)
        torch.testing.assert_close(losses, IO["loss_per_video"], rtol=0, atol=ATOL)
        torch.testing.assert_close(losses.mean(), IO["loss"][0], rtol=0, atol=ATOL)

    @pytest.mark.parametrize(("key", "detach"), [("grad_full", False), ("grad_target_detached", True)])
    def test_gradients(self, scorer: VJepa, key: str, detach: bool) -> None:
        """Of the mean over the batch; they reach 8e-4 and 4e-5, and differ by 3e-10."""
        clip = IO["clip"].clone().requires_grad_()
        scorer.network(clip, MASKS, detach).mean().backward()
        assert clip.grad is not None
        torch.testing.assert_close(clip.grad[..., ::2, ::2], IO[key], rtol=0, atol=1e-8)
        assert all(weight.grad is None for weight in scorer.network.parameters())

    def test_published_sizes(self) -> None:
        with torch.device("meta"):
            network = VJepaNetwork(CHECKPOINTS["vitl16.pth.tar"])
        assert sum(weight.numel() for weight in network.parameters()) == CARD.parameters
        assert network.encoder.module["backbone"].pos_embed.shape == (1, 1568, 1024)


class TestMasks:
    def test_hide_what_the_configuration_says(self) -> None:
        """14 x 14 patches: 8 blocks of 29 patches or 2 of 137, the same at all 8 times, rounding aside."""
        for seed in range(50):
            masks = draw_masks((8, 14, 14), torch.Generator().manual_seed(seed))
            assert len(masks) == len(BLOCKS)
            for (seen, hidden), (count, share) in zip(masks, BLOCKS, strict=True):
                assert torch.cat([seen, hidden], 1).sort().values.tolist() == [list(range(8 * 196))]
                first = hidden[hidden < 196]
                assert torch.equal(hidden[0], (first + 196 * torch.arange(8).unsqueeze(1)).flatten())
                assert 0.8 * share * 196 <= len(first) <= min(195, 1.2 * count * share * 196)

    def test_come_from_the_generator_alone(self) -> None:
        def drawn(seed: int) -> list[Tensor]:
            masks = draw_masks((8, 14, 14), torch.Generator().manual_seed(seed))
            return [part for pair in masks for part in pair]

        state = torch.get_rng_state()
        assert all(torch.equal(*pair) for pair in zip(drawn(3), drawn(3), strict=True))
        assert not all(torch.equal(*pair) for pair in zip(drawn(3), drawn(4), strict=True))
        assert torch.equal(torch.get_rng_state(), state)

    def test_too_small_a_grid(self) -> None:
        with pytest.raises(ValueError, match=r"no mask leaves patches .* on a grid of 1 x 1"):
            draw_masks((8, 1, 1), torch.Generator())


class TestFrames:
    @pytest.mark.parametrize(
        ("count", "first", "stride"),
        [(16, 0, 1), (34, 1, 2), (51, 2, 3), (61, 0, 4), (68, 3, 4), (200, 69, 4)],
    )
    def test_indices(self, count: int, first: int, stride: int) -> None:
        assert frame_indices(count, 16) == [first + stride * index for index in range(16)]

    def test_too_few(self, scorer: VJepa) -> None:
        with pytest.raises(ValueError, match="videos have 3 frames, but V-JEPA reads 4; give it at least 4"):
            scorer.score(clips(1, 3), [CAT])

    @pytest.mark.parametrize("size", [(32, 32), (40, 56), (90, 33), (20, 31)])
    def test_preprocessing(self, scorer: VJepa, size: tuple[int, int]) -> None:
        frames = pixels(clips(2, 4, size))
        clip = scorer.preprocess(frames)
        assert clip.shape == (2, 3, 4, 32, 32)
        grey = scorer.preprocess(torch.full_like(frames, 0.5))
        expected = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225])
        torch.testing.assert_close(grey, expected.view(1, 3, 1, 1, 1).expand_as(grey))
        if size == (32, 32):
            mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            torch.testing.assert_close(clip.transpose(1, 2), (frames - mean) / std)


class TestScores:
    def test_is_minus_the_loss(self, scorer: VJepa) -> None:
        videos = clips(2)
        clip = scorer.preprocess(pixels(videos)[:, 1:5])
        masks = [(seen.expand(2, -1), hidden.expand(2, -1)) for seen, hidden in scorer.masks]
        found = scorer.score(videos, [CAT] * 2)["vjepa"]
        torch.testing.assert_close(found, -scorer.network(clip, masks), rtol=0, atol=1e-6)

    def test_the_seed_decides_the_masks(self, scorer: VJepa, folder: Path) -> None:
        def score(seed: int) -> Tensor:
            other = VJepa.from_pretrained(folder, seed=seed)
            return other.score(clips(2), [CAT] * 2)["vjepa"]

        assert torch.equal(score(0), scorer.score(clips(2), [CAT] * 2)["vjepa"])
        assert not torch.equal(score(1), score(0))

    @pytest.mark.parametrize("detach", [False, True])
    def test_pixels_score_alike_and_take_a_gradient(self, folder: Path, detach: bool) -> None:
        scorer = VJepa.from_pretrained(folder, detach_targets=detach, batch_size=1)
        videos = clips(2)
        inputs = pixels(videos).requires_grad_()
        found = scorer.score_pixels(inputs, [CAT] * 2)["vjepa"]
        expected = scorer.score(videos, [CAT] * 2)["vjepa"]
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)
        found.sum().backward()
        assert inputs.grad is not None
        reached = inputs.grad.abs().amax((0, 2, 3, 4))
        assert (reached[1:5] > 0).all()
        assert (reached[[0, 5]] == 0).all()
        with torch.no_grad():
            better = scorer.score_pixels(inputs + 0.5 * inputs.grad, [CAT] * 2)["vjepa"]
        assert detach or (better > expected).all()

    def test_bfloat16(self, scorer: VJepa, folder: Path) -> None:
        half = VJepa.from_pretrained(folder, dtype=torch.bfloat16)
        assert {weight.dtype for weight in half.network.parameters()} == {torch.bfloat16}
        ours, exact = (one.score(clips(4), [CAT] * 4)["vjepa"] for one in (half, scorer))
        torch.testing.assert_close(ours, exact, rtol=0, atol=0.02)


class TestLoading:
    def test_safetensors_are_preferred(self, scorer: VJepa, copy: Path) -> None:
        save_file(WEIGHTS, copy / "model.safetensors")
        (copy / "vitl16.pth.tar").write_bytes(b"no pickle")
        other = VJepa.from_pretrained(str(copy))
        pair = [one.score(clips(1), [CAT])["vjepa"] for one in (other, scorer)]
        assert torch.equal(*pair)

    def test_missing_files(self, copy: Path) -> None:
        (copy / "vitl16.pth.tar").unlink()
        with pytest.raises(FileNotFoundError, match=r"no weight file in .*vitl16\.pth\.tar"):
            VJepa.from_pretrained(copy)

    def test_without_a_config_it_is_the_published_size(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(
            ValueError, match=r"not a checkpoint of V-JEPA, \d+ weights disagree: missing encoder"
        ):
            VJepa.from_pretrained(copy)

    def test_config_without_a_field(self, copy: Path) -> None:
        (copy / "config.json").write_text(json.dumps({"img_size": 224}))
        with pytest.raises(ValueError, match=r"config\.json lacks patch_size, num_frames"):
            VJepa.from_pretrained(copy)

    def test_not_a_checkpoint(self, copy: Path) -> None:
        torch.save({"encoder": {}}, copy / "vitl16.pth.tar")
        with pytest.raises(ValueError, match=r"vitl16\.pth\.tar has no target_encoder, predictor"):
            VJepa.from_pretrained(copy)
        (copy / "vitl16.pth.tar").write_bytes(b"no pickle")
        with pytest.raises(ValueError, match=r"vitl16\.pth\.tar cannot be read"):
            VJepa.from_pretrained(copy)
