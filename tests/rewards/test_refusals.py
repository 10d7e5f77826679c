"""What no scorer scores, and what no checkpoint is: one clear error each, also through ranking and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_hpsv2
import test_pickscore
import test_videoscore
import torch
from tiny_scorers import MAKERS, PICTURES
from torch import Tensor

from vpo_engine import rank as rank_module
from vpo_engine import train as entry
from vpo_engine.data.sprites.world import Attributes, render
from vpo_engine.rewards.registry import NAMES, reward_card
from vpo_engine.runs.video import write_mp4

CAPTION = "a red circle moving left"
NO_PROMPT = ("builtin", "q_align", "vjepa", "laion_aesthetic")


@pytest.fixture(scope="module", params=MAKERS)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("scorer") / "tiny")


def video(name: str, frames: int = 17, count: int = 1) -> Tensor:
    """Of a size that every scorer takes."""
    side = 32 if name == "sprites" else 192
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, side, side, 3), generator=generator, dtype=torch.uint8)


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
        assert set(MAKERS) == set(NAMES) - variants

    def test_refuses_videos_without_frames_and_none_at_all(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        refused(made, video(name, frames=0), [CAPTION], "(1, 0, ")
        refused(made, video(name, count=0), [], "(0, 17, ")

    def test_refuses_pictures_unless_it_scores_pictures(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        if name in PICTURES:
            scores = made.score(video(name, frames=1), [CAPTION])
            assert all(bool(values.isfinite().all()) for values in scores.values())
        else:
            refused(made, video(name, frames=1), [CAPTION], "videos have 1 frame", "(1, 1, ")

    def test_refuses_prompts_without_text_if_it_reads_them(self, scorer: tuple[str, Any]) -> None:
        name, made = scorer
        assert reward_card(name).reads_prompt is (name not in NO_PROMPT)
        for prompt in ("", " \n"):
            if reward_card(name).reads_prompt:
                refused(made, video(name), [prompt], f"prompt 0 is {prompt!r}", "caption ")
        if name in NO_PROMPT:
            with_text, without = (made.score(video(name), [prompt]) for prompt in (CAPTION, ""))
            assert all(torch.equal(with_text[key], without[key]) for key in with_text)


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
