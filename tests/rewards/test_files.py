"""Every scorer on video files: its scores of the tensor of all frames, at the file's own rate, in little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import video_cases
from after_torch import run_after_torch
from tiny_scorers import IMAGES, PUBLISHED, SCORERS, make
from tiny_videos import noise
from torch import Tensor

from vpo_engine import rank as rank_module
from vpo_engine.metrics.registry import build_metric
from vpo_engine.rewards.builtin import Builtin
from vpo_engine.rewards.process import start_reward
from vpo_engine.rewards.registry import RewardSpec
from vpo_engine.rewards.videoalign import VideoAlign
from vpo_engine.runs.video import read_video, write_mp4
from vpo_engine.runs.video_file import VideoFile

CAPTION = "a red circle moving left"
TIMED = ("videoalign", "q_align", "videoscore2", "unified_reward")
ALL_FRAMES = ("sprites", "builtin", *IMAGES)
"""The scorers that look at every frame."""
OWN_SIZES = {"sprites": (17, 32, 32), "builtin": (17, 96, 192)}
"""Frames, height and width, where a scorer takes no small ones."""


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, make(request.param, tmp_path_factory.mktemp("scorer") / "tiny")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames, 8 a second."""
    file = tmp_path_factory.mktemp("file") / "a.mp4"
    write_mp4(file, noise(24, 64, 96, 3), 8, min_side=64)
    return file


def test_scores_are_those_of_all_frames(
    scorer: tuple[str, Any], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the scorer decodes no more than it looks at."""
    name, made = scorer
    if name in OWN_SIZES:
        path = tmp_path / "own.mp4"
        write_mp4(path, noise(*OWN_SIZES[name], 3), 8)
    file, (frames, fps) = VideoFile.open(path), read_video(path)
    if hasattr(made, "fps"):
        monkeypatch.setattr(made, "fps", fps)
    read: list[int] = []
    frame = VideoFile._frame
    monkeypatch.setattr(VideoFile, "_frame", lambda self, index: read.append(index) or frame(self, index))
    if name in ("videoscore2", "unified_reward"):  # tiny judges write nonsense: compare what they are shown
        shown: list[Tensor] = []
        monkeypatch.setattr(
            made.judge, "answer", lambda clips, *_: shown.extend(c.frames for c in clips) or 1 / 0
        )
        for videos in (file, frames.unsqueeze(0)):
            with pytest.raises(ZeroDivisionError):
                made.score(videos, [CAPTION])
        assert shown
        assert all(
            torch.equal(*pair)
            for pair in zip(shown[: len(shown) // 2], shown[len(shown) // 2 :], strict=True)
        )
    else:
        found, expected = made.score(file, [CAPTION]), made.score(frames.unsqueeze(0), [CAPTION])
        assert {key: value.item() for key, value in found.items()} == {
            key: value.item() for key, value in expected.items()
        }
    assert len(read) == len(set(read))
    assert len(read) == len(frames) if name in ALL_FRAMES else 0 < len(read) <= 20


def test_brisque_reads_eight_frames(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    frame = VideoFile._frame
    monkeypatch.setattr(VideoFile, "_frame", lambda self, index: read.append(index) or frame(self, index))
    Builtin(dimensions=("visual_quality",)).score(VideoFile.open(path), [""])
    assert read == [1, 4, 7, 10, 13, 16, 19, 22]


class TestFrameRates:
    @pytest.fixture(scope="class")
    @staticmethod
    def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return PUBLISHED["videoalign"].write(tmp_path_factory.mktemp("weights") / "tiny")

    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The same frames at 4 and at 8 a second; people prefer the second."""
        folder = tmp_path_factory.mktemp("clips")
        for fps in (4, 8):
            write_mp4(folder / f"{fps}.mp4", noise(24, 64, 64, 3), fps, min_side=64)
        (folder / "prompts.csv").write_text("video,prompt\n4.mp4,w3 a cat\n8.mp4,w3 a cat\n")
        row = {"prompt": "w3 a cat", "videos": ["4.mp4", "8.mp4"], "preferred": 1}
        (folder / "preferred.jsonl").write_text(json.dumps(row) + "\n")
        return folder

    @pytest.mark.parametrize("more", [("--time-limit", "120"), ("--preferences", "preferred.jsonl")])
    @pytest.mark.long
    def test_each_clip_is_scored_at_its_own(
        self, weights: Path, folder: Path, tmp_path: Path, more: tuple[str, ...]
    ) -> None:
        options = [str(folder / text) if text.endswith("jsonl") else text for text in more]
        arguments = [
            str(folder),
            "--reward",
            "videoalign",
            "--reward-path",
            str(weights),
            "--out",
            str(tmp_path),
        ]
        assert rank_module.main([*arguments, *options]) == 0
        rows = [line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines()]
        found = {row[0]: [float(cell) for cell in row[2:5]] for row in rows[1:]}
        for fps in (4, 8):
            alone = VideoAlign.from_pretrained(weights, dtype=torch.float32, fps=fps)
            expected = alone.score(read_video(folder / f"{fps}.mp4")[0].unsqueeze(0), ["w3 a cat"])
            assert found[f"{fps}.mp4"] == [value.item() for value in expected.values()]
        assert found["4.mp4"] != found["8.mp4"]

    @pytest.mark.parametrize("name", TIMED)
    def test_the_rate_of_the_file_counts(self, name: str, folder: Path, tmp_path: Path) -> None:
        """Not the one that the scorer was made for, which is that of tensors."""
        made = PUBLISHED[name].load(PUBLISHED[name].write(tmp_path / "tiny"), fps=24.0)
        asked: list[list[int]] = []

        class Recorded(VideoFile):
            def __getitem__(self, key: Any) -> Tensor:
                asked.append(list(key[1]))
                raise KeyError

        numbers: dict[float, list[int]] = {}
        for fps in (2.0, 8.0):
            file = Recorded(folder / "8.mp4", 48, 64, 64, fps)
            if name == "unified_reward":  # version 2 looks at 16 frames whatever the rate
                made.version = 1
            with pytest.raises(KeyError):
                made.score(file, ["w3 a cat"])
            numbers[fps] = asked[-1]
        assert len(numbers[2.0]) == {"q_align": 24}.get(name, 48)
        assert len(numbers[8.0]) == {"q_align": 6}.get(name, 12)

    def test_a_metric_refuses_a_video_by_its_own_rate(self, tmp_path: Path) -> None:
        """17 frames are two seconds at 8 a second, and less than one at the rate of the video before."""
        metric = build_metric("reward:q_align", weights=PUBLISHED["q_align"].write(tmp_path / "tiny"))
        for frames, fps in ((30, 24.0), (17, 8.0)):
            assert set(metric.measure(noise(frames, 28, 28, 3), "", fps).values) == {"quality", "aesthetics"}

    def test_a_metric_takes_the_rate_of_each_video(self, weights: Path) -> None:
        metric, video = build_metric("reward:videoalign", weights=weights), noise(12, 28, 28, 3)
        for fps in (24.0, 2.0):
            alone = VideoAlign.from_pretrained(weights, dtype=torch.float32, fps=fps)
            expected = alone.score(video.unsqueeze(0), ["w3 a cat"])
            found = metric.measure(video, "w3 a cat", fps).values
            assert found == pytest.approx({name: value.item() for name, value in expected.items()}, abs=2e-6)


@pytest.mark.long
def test_a_child_process_reads_the_file_itself(tmp_path: Path) -> None:
    path, own = tmp_path / "a.mp4", RewardSpec("process_rewards:Scripted")
    write_mp4(path, noise(*OWN_SIZES["builtin"], 3), 8)
    file = VideoFile.open(path)
    here = Builtin().score(file, [""])
    with start_reward(RewardSpec("builtin")) as there:
        found = there.score(file, [""])
        assert all(torch.equal(found[name], here[name]) for name in here)
    with start_reward(own) as there:  # of a user's own class, which takes tensors
        assert there.score(file, ["a"])["mean"].item() == file[:, :].double().mean().float().item()


SCRIPT = """
import resource
from vpo_engine import rank
import vpo_engine.metrics.ranking_report, vpo_engine.rewards.process, vpo_engine.runs.video_file
from vpo_engine.rewards import {module}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
assert rank.main({words!r}) == 0
print(peak() - before)
"""


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 frames of 640 x 360, which are 198 MiB."""
    folder = tmp_path_factory.mktemp("long")
    clip = video_cases.moving(20, 360, 640).repeat(15, 1, 1, 1)
    video_cases.write(folder / "w3-a-cat.mp4", clip, rate=30, options={"preset": "ultrafast"})
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", ["builtin", "videoalign", "pickscore"])
def test_a_long_clip_takes_less_memory_than_its_frames(name: str, long_clip: Path, tmp_path: Path) -> None:
    """Long: a process of its own decodes 300 frames, twice. Of one kind each: all frames at several places, some frames
    at once, and all frames one after the other; how many a scorer reads is tested for all."""
    weights = []
    if name in PUBLISHED:
        weights = ["--reward-path", str(PUBLISHED[name].write(tmp_path / "tiny"))]
    words = [str(long_clip), "--reward", name, *weights, "--out", str(tmp_path / "out")]
    code, printed = run_after_torch(SCRIPT.format(module=name, words=words))
    assert code == 0, printed
    assert int(printed.splitlines()[-1]) < 1.5 * 300 * 640 * 360 * 3
