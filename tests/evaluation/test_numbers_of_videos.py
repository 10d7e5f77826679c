"""Which videos of a folder are measured, by their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_case import PROMPTS, run, videos

from vpo_engine.evaluation.folders import Video, read_folder, suite_of


def test_of_folders_as_many_videos_of_each_prompt_are_planned_as_are_asked_for() -> None:
    one = [Video(Path("a"), "a cat", index, "a") for index in (2, 0, 1)]
    other = [Video(Path("b"), "a dog", index, "b") for index in (7, 5)]
    expected = [(0, "a cat", 0), (0, "a cat", 1), (1, "a dog", 5), (1, "a dog", 7)]
    assert suite_of([one, other], "folders", 2).videos([]) == expected
    assert len(suite_of([one, other], "folders", None).videos([])) == 5


def test_videos_of_a_prompt_whose_names_end_alike_are_counted_in_order(tmp_path: Path) -> None:
    names = ("first-0.mp4", "second-0.mp4")
    for name in names:
        (tmp_path / name).touch()
    rows = [json.dumps({"video": name, "prompt": "a cat"}) for name in names]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    assert [(video.name, video.index) for video in read_folder(tmp_path)] == [(names[0], 0), (names[1], 1)]


def test_a_folder_with_none_of_the_numbers_that_are_asked_for_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers begin with 1, and one video of each prompt is asked for: number 0."""
    folder, prompts = videos(tmp_path / "clips", 150, PROMPTS[:1]), tmp_path / "prompts.txt"
    (folder / f"{PROMPTS[0]}-0.mp4").unlink()
    prompts.write_text(PROMPTS[0])
    assert run(folder, "--prompts", prompts, "--metrics", "pixels", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"error: {folder} has none of the 1 videos that are asked for, such as number 0 of" in said
    assert "such as number 1 of" in said
