"""Comparisons in which one side lacks a video: the pair is left out on both sides."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from evaluation_case import PROMPTS, results_of, run, videos

from vpo_engine.distributed.processes import Processes
from vpo_engine.evaluation.results import _statistics_text


def test_a_pair_counts_only_if_both_of_its_videos_can_be_measured(tmp_path: Path) -> None:
    """Equal videos but for one damaged file differ by exactly nothing, though that file would change the mean."""
    one = videos(tmp_path / "one", 150)
    # A copy: x264 does not repeat its bytes for frames as small as these.
    other = Path(shutil.copytree(one, tmp_path / "other"))
    damaged = other / f"{PROMPTS[2]}-1.mp4"
    damaged.write_bytes(b"no video")
    out = tmp_path / "out"
    assert run(one, "--baseline", other, "--metrics", "pixels", "--out", out) == 1
    results = results_of(out)
    entry = results["measures"]["pixels/sharpness"]
    assert entry["comparison"]["difference"] == 0
    assert entry["comparison"]["pairs"] == 7
    assert entry["policy"]["value"] == pytest.approx(entry["baseline"]["value"])
    assert entry["policy"]["provenance"]["count"] == entry["baseline"]["provenance"]["count"] == 7
    assert set(results["problems"]["baseline"]) == {damaged.name}
    assert results["problems"]["policy"] == {}


def test_two_prompts_of_the_same_bytes_have_records_of_their_own(tmp_path: Path) -> None:
    """Records are kept by bytes and prompt: the displacement along the prompt depends on the prompt."""
    folder = videos(tmp_path / "clips", 150, PROMPTS[:1], count=1)
    content = (folder / f"{PROMPTS[0]}-0.mp4").read_bytes()
    (folder / "a red circle moving right-0.mp4").write_bytes(content)
    out = tmp_path / "out"
    assert run(folder, "--metrics", "pixels:sprites", "--out", out) == 0
    values = [row["policy"]["values"]["pixels:sprites/displacement"] for row in results_of(out)["videos"]]
    assert values[0] == pytest.approx(-values[1])
    assert values[0] != 0


def test_a_missing_video_makes_the_results_partial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:2]), tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    (folder / f"{PROMPTS[1]}-1.mp4").unlink()
    words = ("--prompts", prompts, "--samples", "2", "--metrics", "pixels", "--out", out)
    assert run(folder, *words) == 1
    results = results_of(out)
    assert results["partial"] is True
    assert results["problems"]["policy"] == {f"{PROMPTS[1]}-1.mp4": "is missing"}
    assert results["measures"]["pixels/sharpness"]["policy"]["provenance"]["count"] == 3
    assert "- 1 video of the policy is missing:" in " ".join(capsys.readouterr().out.split())


def test_a_row_that_another_process_did_not_finish_is_left_out(tmp_path: Path) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1]), tmp_path / "out"
    words = (folder, "--metrics", "pixels", "--out", out)
    assert run(*words) == 0
    (own,) = out.rglob("process_0.jsonl")
    first = own.read_bytes().partition(b"\n")[0]
    (own.parent / "process_1.jsonl").write_bytes(first + b"\n" + first[: len(first) // 2])
    assert run(*words) == 0


def test_a_metric_that_cannot_be_loaded_makes_the_results_partial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1]), tmp_path / "out"
    weights = tmp_path / "raft-things.pth"
    weights.write_bytes(b"no weights")
    words = ("--metrics", "pixels,devil_flow", "--weights", f"devil_flow={weights}", "--out", out)
    assert run(folder, *words) == 1
    results = results_of(out)
    assert results["partial"] is True
    assert set(results["unloaded"]) == {"devil_flow"}
    assert results["measures"]["pixels/motion"]["policy"]["provenance"]["count"] == 2
    assert "devil_flow could not be loaded" in " ".join(capsys.readouterr().out.split())


def test_the_other_processes_are_left_in_good_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(Processes, "stop", lambda processes: left.append(processes.rank))
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1], count=1), tmp_path / "out"
    assert run(folder, "--metrics", "pixels", "--out", out) == 0
    assert left == [0]


def test_equal_videos_of_one_prompt_count_as_two(tmp_path: Path) -> None:
    folder, out = videos(tmp_path / "clips", 150, PROMPTS[:1], count=1), tmp_path / "out"
    shutil.copyfile(folder / f"{PROMPTS[0]}-0.mp4", folder / f"{PROMPTS[0]}-1.mp4")
    assert run(folder, "--metrics", "pixels", "--out", out) == 0
    assert results_of(out)["measures"]["pixels/motion"]["policy"]["provenance"]["count"] == 2


def test_p_is_corrected_for_the_measures_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a broken table")

    monkeypatch.setattr("vpo_engine.evaluation.engine_metrics.pixel_measures", fail)
    one, other = (videos(tmp_path / str(light), light, PROMPTS[:2], count=1) for light in (150, 90))
    out = tmp_path / "out"
    assert run(one, "--baseline", other, "--metrics", "pixels,proxy_flicker", "--out", out) == 1
    found = re.search(r"There \w+ (\d+) measure", results_of(out)["statistics"])
    assert found is not None
    assert found[1] == "1"


def test_nothing_is_said_of_bounds_where_nothing_is_compared() -> None:
    assert _statistics_text(0) == ""
    assert "There is 1 measure," in _statistics_text(1)
