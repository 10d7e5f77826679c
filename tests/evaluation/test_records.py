"""What the processes of an evaluation tell each other of videos that fail, and what the next start tries again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_case import PROMPTS, results_of, run, videos

from vpo_engine.distributed.processes import Processes
from vpo_engine.evaluation import engine_metrics, measuring
from vpo_engine.evaluation.arms import Arm
from vpo_engine.evaluation.folders import read_folder
from vpo_engine.evaluation.measuring import ArmVideos, scan
from vpo_engine.evaluation.records import FACTS, Records
from vpo_engine.evaluation.session import _look
from vpo_engine.metrics.pixels import pixel_measures
from vpo_engine.runs.video_file import VideoFile

FAILING = f"{PROMPTS[0]}-1.mp4"


def side_of(folder: Path) -> ArmVideos:
    arm = Arm("policy", "clips", folder=folder)
    return ArmVideos(arm, {video.key: video for video in read_folder(folder)})


def test_a_file_that_another_process_could_not_read_is_named(tmp_path: Path) -> None:
    folder = videos(tmp_path / "clips", 150, PROMPTS[:1])
    (folder / FAILING).write_bytes(b"no video")
    side, other = side_of(folder), Records(tmp_path / "records", 1)
    other.begin()
    scan(list(side.videos.values()), other, show=False)
    _look([side], [], Records(tmp_path / "records", 0), Processes.start("cpu"))
    assert set(side.problems) == {FAILING}


def test_a_file_that_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened, problems = videos(tmp_path / "clips", 150, PROMPTS[:1]), VideoFile.open, []

    def fails(path: Path) -> VideoFile:
        if path.name == FAILING:
            raise OSError("the disk is away")
        return opened(path)

    for away in (True, False):
        with monkeypatch.context() as patch:
            if away:
                patch.setattr(VideoFile, "open", fails)
            side = side_of(folder)
            share = list(side.videos.values())
            _look([side], share, Records(tmp_path / "records", 0), Processes.start("cpu"))
        problems.append(dict(side.problems))
    assert problems == [{FAILING: "the disk is away"}, {}]


def test_what_a_metric_of_another_process_raised_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, measure = videos(tmp_path / "clips", 150, PROMPTS[:2]), tmp_path / "out", measuring.measure

    def fail_once(frames: Any, prompts: list[str]) -> Any:
        if prompts[0] == PROMPTS[1]:
            raise KeyError("a broken table")
        return pixel_measures(frames, prompts)

    def elsewhere(share: Any, covers: Any, choice: Any, records: Records, *rest: Any) -> Any:
        other = Records(records._folder, 1)
        other.begin()
        other.read(failures=[FACTS])
        return measure(share, covers, choice, other, *rest)

    monkeypatch.setattr(engine_metrics, "pixel_measures", fail_once)
    monkeypatch.setattr(measuring, "measure", elsewhere)
    assert run(folder, "--metrics", "pixels", "--out", out) == 1
    failed = results_of(out)["measures"]["pixels/motion"]["failed"]["policy"]
    assert set(failed) == {f"{PROMPTS[1]}-{index}.mp4" for index in range(2)}
    assert all("KeyError" in reason for reason in failed.values())
