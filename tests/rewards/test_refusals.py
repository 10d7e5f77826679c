"""Test that a scorer's wrong inputs and checkpoints are one clear error each, also through ranking and training."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_hpsv2
import test_pickscore
import test_videoscore
import torch
from tiny_scorers import IMAGES, PICTURES, PUBLISHED, SCORERS, make
from tiny_videos import noise, pixels
from torch import Tensor, nn

from vpo_engine import rank as rank_module
from vpo_engine import train as entry
from vpo_engine.data.sprites.world import Attributes, render
from vpo_engine.rewards.kinds import NAMES
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.registry import reward_card
from vpo_engine.runs.video import write_mp4

CAPTION = "a red circle moving left"
NO_PROMPT = ("builtin", "q_align", "vjepa", "laion_aesthetic")
ONE_FRAME = {
    "sprites": "videos have shape (1, 1, ",
    "builtin": "videos have 1 frame, but temporal_consistency compares 3",
    "viclip": "videos have 1 frame, but ViCLIP reads 8; give it at least 8",
    "vjepa": "videos have 1 frame, but V-JEPA reads 4; give it at least 4",
}
SPECIAL = {
    "videoscore": ("<image>", "VideoScore"),
    "videoscore2": ("<|im_end|>", "VideoScore2"),
    "videoalign": ("<|TA_reward|>", "VideoAlign"),
    "unified_reward": ("<|im_end|>", "UnifiedReward"),
    "viclip": ("<|endoftext|>", "CLIP"),
    "imagereward": ("[SEP]", "BERT"),
    "mps": ("<|endoftext|>", "CLIP"),
    "hpsv2": ("<|endoftext|>", "CLIP"),
    "pickscore": ("<|endoftext|>", "CLIP"),
}
"""A special token of each tokenizer that has any, and whose the tokenizer is."""


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, make(request.param, tmp_path_factory.mktemp("scorer") / "tiny")


def video(name: str, frames: int = 17, count: int = 1) -> Tensor:
    """Of a size that every scorer takes."""
    side = 32 if name == "sprites" else 192
    return noise(count, frames, side, side, 3)


@contextmanager
def damaged(network: nn.Module) -> Iterator[None]:
    """All weights are NaN meanwhile."""
    kept = {key: weight.clone() for key, weight in network.state_dict().items()}
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(float("nan"))
    yield
    network.load_state_dict(kept)


def refused(scorer: Any, videos: Tensor, prompts: list[str], *words: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        scorer.score(videos, prompts)
    message = str(caught.value)
    assert "\n" not in message
    assert any(word in message for word in words), message


class TestEveryScorer:
    def test_is_here(self) -> None:
        """The variants of one scorer count as one."""
        variants = {"videoscore_v1_1", "hpsv2_1", "brisque", "sprites_image"}
        assert set(SCORERS) == set(NAMES) - variants

    def test_refuses_videos_without_frames_and_none_at_all(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        refused(made, video(name, frames=0), [CAPTION], "videos have shape (1, 0, ")
        refused(made, video(name, count=0), [], "videos have shape (0, 17, ")

    def test_refuses_other_types_and_shapes(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        videos = video(name)
        sizes = "this reward scores clips of the sprites world only"
        refused(made, videos.float(), [CAPTION], "videos are torch.float32, expected torch.uint8 levels")
        refused(made, videos.movedim(4, 2), [CAPTION], "videos have shape (1, 17, 3, ")
        refused(made, videos.movedim(4, 1), [CAPTION], "videos have shape (1, 3, 17, ")
        refused(made, videos[0], [CAPTION], "videos of different sizes go in separate calls", sizes)
        refused(made, video(name, count=2), [CAPTION], "1 prompts for 2 videos; give one")

    def test_refuses_other_pixels(self, scorer: tuple[str, Any]) -> None:
        """Test videos of floats, which carry gradients to their pixels."""
        name, made = scorer
        if not hasattr(made, "score_pixels"):
            assert name in ("sprites", "videoscore", "videoscore2", "unified_reward")
            return
        message = "videos are torch.uint8, expected floats in 0..1"
        with pytest.raises(ValueError, match=re.escape(message)):
            made.score_pixels(video(name), [CAPTION])
        with pytest.raises(ValueError, match=re.escape("), expected [B, F, 3, H, W]")):
            made.score_pixels(video(name) / 255, [CAPTION])
        with pytest.raises(ValueError, match="2 prompts for 1 videos"):
            made.score_pixels(pixels(video(name)), [CAPTION] * 2)

    def test_refuses_pictures_unless_it_scores_pictures(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        if name in PICTURES:
            scores = made.score(video(name, frames=1), [CAPTION])
            assert all(bool(values.isfinite().all()) for values in scores.values())
        else:
            words = ONE_FRAME.get(name, "videos have 1 frame, expected at least 2")
            refused(made, video(name, frames=1), [CAPTION], words)

    def test_refuses_prompts_without_text_if_it_reads_them(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        assert reward_card(name).reads_prompt is (name not in NO_PROMPT)
        for prompt in ("", " \n"):
            if reward_card(name).reads_prompt:
                refused(made, video(name), [prompt], f"prompt 0 is {prompt!r}", "caption ")
            if name in PUBLISHED and name not in NO_PROMPT:
                row = 17 if name in IMAGES else 1  # of the frames
                words = f"prompt {row} is {prompt!r}, expected text: {PUBLISHED[name].called} judges by it"
                videos, prompts = video(name, count=2), [CAPTION, prompt]
                refused(made, videos, prompts, words)
                if hasattr(made, "score_pixels"):
                    with pytest.raises(ValueError, match=re.escape(words)):
                        made.score_pixels(pixels(videos), prompts)
        if name in NO_PROMPT:
            with_text, without = (made.score(video(name), [prompt]) for prompt in (CAPTION, ""))
            assert all(torch.equal(with_text[key], without[key]) for key in with_text)

    def test_refuses_special_tokens_in_prompts(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        if name in SPECIAL:
            token, reader = SPECIAL[name]
            words = f"contains {token!r}, which {reader}'s tokenizer reads as a special token; remove it from"
            refused(made, video(name), [f"a cat {token}"], words)
        else:
            assert name in (*NO_PROMPT, "sprites")

    def test_says_beforehand_which_prompts_it_refuses(self, scorer: tuple[str, Any]) -> None:
        """In the words of the error that scoring a video would raise."""
        name, made = scorer
        prompts = [CAPTION, "", f"a cat {SPECIAL[name][0]}" if name in SPECIAL else "a cat"]
        found = refusals(made, prompts)
        for row in found:
            with pytest.raises(ValueError, match=r"\S") as caught:
                made.score(video(name), [prompts[row]])
            assert str(caught.value).replace("prompt 17 ", "prompt 0 ") == found[row]
        assert list(found) == ([] if name in NO_PROMPT else [1, 2])

    def test_says_beforehand_which_sizes_it_refuses(self, scorer: tuple[str, Any]) -> None:
        """In the words of the error that scoring a video would raise; the judges answer nothing at tiny sizes."""
        name, made = scorer
        side = 32 if name == "sprites" else 192
        assert size_refusal(made, 17, side, side) is None
        for frames, height, width in ((1, side, side), (2, side, side), (5, side, side), (17, 8, 2000)):
            reason = size_refusal(made, frames, height, width)
            videos = noise(1, frames, height, width, 3)
            if reason is not None:
                with pytest.raises(ValueError, match=r"\S") as caught:
                    made.score(videos, [CAPTION])
                assert reason in str(caught.value) or name == "sprites"
            elif name not in ("videoscore2", "unified_reward"):
                made.score(videos, [CAPTION])
        if name in ONE_FRAME:
            assert size_refusal(made, 1, side, side) is not None

    def test_refuses_scores_that_are_not_finite(self, scorer: tuple[str, Any]) -> None:
        """Except for judges that write."""
        name, made = scorer
        if name not in PUBLISHED or not reward_card(name).differentiable:
            return
        called = PUBLISHED[name].called
        if len(made.dimensions) > 1:
            called += f" ({made.dimensions[0]})"
        words = f"{called} gave nan for input 0 ({CAPTION!r}); its weights are damaged"
        videos, prompts = video(name), [CAPTION]
        with damaged(made.network):
            refused(made, videos, prompts, words)
            if hasattr(made, "score_pixels"):
                with pytest.raises(ValueError, match=re.escape(words)):
                    made.score_pixels(pixels(videos), prompts)
        assert all(bool(values.isfinite().all()) for values in made.score(videos, prompts).values())


@pytest.mark.parametrize("scorer", IMAGES, indirect=True)
class TestEveryImageScorer:
    """By itself, without ``VideoOfFrames``."""

    @pytest.mark.parametrize(
        ("images", "prompts", "message"),
        [
            (torch.zeros(1, 8, 8, 3), ["a"], "images are torch.float32, expected torch.uint8"),
            (noise(1, 8, 8, 4), ["a"], "images have shape (1, 8, 8, 4), expected [B, H, W, 3]"),
            (noise(1, 3, 24, 30), ["a"], "images have shape (1, 3, 24, 30), expected [B, H, W, 3]"),
            (noise(8, 8, 3), ["a"], "images have shape (8, 8, 3), expected [B, H, W, 3]"),
            (noise(0, 8, 8, 3), [], "images have shape (0, 8, 8, 3), expected [B, H, W, 3]"),
            (noise(2, 8, 8, 3), ["a"], "1 prompts for 2 images; give one for each"),
        ],
    )
    def test_images(self, scorer: tuple[str, Any], images: Tensor, prompts: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            scorer[1].scorer.score_images(images, prompts)

    @pytest.mark.parametrize(
        ("images", "prompts", "message"),
        [
            (noise(1, 3, 8, 8), ["a"], "images are torch.uint8, expected floats in 0..1"),
            (torch.zeros(1, 8, 8, 3), ["a"], "images have shape (1, 8, 8, 3), expected [B, 3, H, W]"),
            (torch.zeros(1, 3, 8, 8), ["a", "b"], "2 prompts for 1 images; give one for each"),
        ],
    )
    def test_pixels(self, scorer: tuple[str, Any], images: Tensor, prompts: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            scorer[1].scorer.score_image_pixels(images, prompts)

    @pytest.mark.parametrize("prompt", ["", " ", "\n"])
    def test_prompts_without_text(self, scorer: tuple[str, Any], prompt: str) -> None:
        name, made = scorer[0], scorer[1].scorer
        if name not in NO_PROMPT:
            words = f"is {prompt!r}, expected text: {PUBLISHED[name].called} judges by it"
            with pytest.raises(ValueError, match=re.escape(f"prompt 1 {words}")):
                made.score_images(noise(2, 8, 8, 3), ["a", prompt])
            with pytest.raises(ValueError, match=re.escape(f"prompt 0 {words}")):
                made.score_image_pixels(torch.zeros(1, 3, 8, 8), [prompt])


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_folders_are_not_downloaded(name: str) -> None:
    scorer = PUBLISHED[name].scorer
    module = inspect.getmodule(scorer)
    assert module is not None
    assert " needs a " in module.REMEDY
    with pytest.raises(FileNotFoundError, match=re.escape(f"no folder at owner/model; {module.REMEDY}")):
        scorer.from_pretrained("owner/model")


def another_model(folder: Path) -> Path:
    """The files that PickScore looks for, with the weights of HPSv2."""
    test_pickscore.write_checkpoint(folder)
    other = test_hpsv2.write_checkpoint(folder.parent / "hpsv2")
    (folder / "model.safetensors").unlink()
    weights = torch.load(next(other.glob("*.pt")), weights_only=True)["state_dict"]
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def no_tokenizer(folder: Path) -> Path:
    test_pickscore.write_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    return folder


CHECKPOINTS = [(another_model, "is not a checkpoint of PickScore"), (no_tokenizer, "tokenizer.json")]


@pytest.mark.parametrize(("make", "words"), CHECKPOINTS)
@pytest.mark.long
def test_wrong_checkpoints_are_one_line(
    make: Any,
    words: str,
    smallest: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By both commands, the same."""
    folder = make(tmp_path / "checkpoint")
    videos = tmp_path / "videos"
    videos.mkdir()
    clip = render(Attributes.of([CAPTION]), torch.Generator().manual_seed(0))[0]
    write_mp4(videos / f"{CAPTION.replace(' ', '-')}.mp4", clip, 8)
    assert rank_module.main([str(videos), "--reward", "pickscore", "--reward-path", str(folder)]) == 1
    ranked = capsys.readouterr()
    assert ranked.out == ""
    run = tmp_path / "run"
    settings = ["reward.kind=pickscore", f"reward.path={folder}", "reward.dimensions=global"]
    assert entry.main([*smallest, *settings, f"run_dir={run}"]) == 1
    trained = capsys.readouterr()
    assert trained.err == ranked.err
    assert ranked.err.startswith("error: ")
    assert ranked.err.count("\n") == 1
    assert words in ranked.err
    assert str(folder) in ranked.err
    assert not run.exists()


def test_prompts_without_text_are_named_before_training(
    smallest: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle moving left"}\n{"prompt": " "}\n')
    assert entry.main([*smallest, f"prompts.train={file}", f"run_dir={tmp_path / 'run'}"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert str(file) in shown
    assert "2" in shown
    assert not (tmp_path / "run").exists()


def test_pictures_for_a_video_scorer_through_ranking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, videos = test_videoscore.write_checkpoint(tmp_path / "videoscore"), tmp_path / "videos"
    videos.mkdir()
    write_mp4(videos / "a-cat.mp4", video("videoscore", frames=1)[0], 8)
    assert rank_module.main([str(videos), "--reward", "videoscore", "--reward-path", str(folder)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.splitlines()[-1]
    assert last.startswith(
        "error: video a-cat.mp4: videos have 1 frame, expected at least 2: VideoScore judges motion"
    )
