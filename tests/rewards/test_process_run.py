"""Runs and rankings whose reward is in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vpo_engine import rank as rank_module
from vpo_engine import train as entry
from vpo_engine.build import build_reward
from vpo_engine.config import Config
from vpo_engine.data.sprites.damage import sample_clean
from vpo_engine.rewards import registry
from vpo_engine.runs.log import read_metrics
from vpo_engine.runs.video import write_mp4

Make = Callable[..., Config]
BRIEF = ("steps=2", "evaluation.every=null", "checkpoint.every=1")


def numbers(run: Path) -> list[dict[str, object]]:
    """Metric rows without what a clock wrote."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: row[name] for name in row if not name.startswith(("seconds/", "speed/"))} for row in rows]


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_is_the_same_with_the_reward_in_another_process(
    smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    for name, process in (("here", "false"), ("there", "true")):
        settings = [*smallest, small_policy, *BRIEF]
        arguments = [*settings, f"reward.process={process}", f"run_dir={tmp_path / name}"]
        assert entry.main(arguments) == 0
    assert numbers(tmp_path / "here") == numbers(tmp_path / "there")


@pytest.mark.usefixtures("unplanned")
@pytest.mark.long
def test_a_run_whose_reward_hangs_stops_with_one_line(
    smallest: list[str],
    small_policy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    limit = ["reward.kind=process_rewards:SpritesThatHang", "reward.process=true", "reward.time_limit=3.5"]
    assert entry.main([*smallest, small_policy, *BRIEF, *limit, f"run_dir={run}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: reward 'process_rewards:SpritesThatHang' took longer than its time limit of 3.5 s while it scored "
    )
    assert not (run / "summary.json").exists()


class TestSettings:
    def test_a_time_limit_needs_a_process(self, small: Make) -> None:
        with pytest.raises(
            ValueError, match=r"time_limit=5 needs reward\.process=true: nothing else can be stopped"
        ):
            small("reward.time_limit=5")

    def test_a_device_that_is_not_there(self, small: Make) -> None:
        absent = f"cuda:{torch.cuda.device_count()}"
        with pytest.raises(
            ValueError, match=rf"reward\.device={absent}, but torch sees \d+ CUDA devices; set"
        ):
            build_reward(small(f"reward.device={absent}"), torch.device("cpu"))
        with pytest.raises(ValueError, match=r"reward\.device=gpu: must be auto, cpu, cuda"):
            small("reward.device=gpu")

    def test_a_device_of_its_own(self, small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """It does not take turns with what is on the policy's."""
        seen: dict[str, object] = {}
        monkeypatch.setattr(registry, "build_reward", lambda *_, **options: seen.update(options))
        build_reward(small("reward.device=cpu"), torch.device("cuda", 0))
        assert (seen["device"], seen["dtype"]) == (torch.device("cpu"), torch.float32)


class TestRanking:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        clips = sample_clean(2, torch.Generator().manual_seed(0))
        for video, caption in zip(clips.videos, clips.captions, strict=True):
            write_mp4(tmp_path / f"{caption.replace(' ', '-')}.mp4", video, 8)
        return tmp_path

    @pytest.mark.long
    def test_scores_of_a_process_with_a_time_limit_are_the_same(self, folder: Path, tmp_path: Path) -> None:
        arguments = [str(folder), "--reward", "sprites", "--out"]
        assert rank_module.main([*arguments, str(tmp_path / "here")]) == 0
        assert rank_module.main([*arguments, str(tmp_path / "there"), "--time-limit", "60"]) == 0
        here, there = ((tmp_path / name / "scores.csv").read_bytes() for name in ("here", "there"))
        assert here == there

    @pytest.mark.long
    def test_a_scorer_that_hangs_is_one_line_with_the_file(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kind = "process_rewards:ScorerThatHangs"
        assert rank_module.main([str(folder), "--reward", kind, "--time-limit", "1"]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        note, error = shown.err.splitlines()
        assert note.startswith("note: the prompts of 2 of 2 videos are taken from their file names")
        first = min(path.name for path in folder.glob("*.mp4"))
        assert error.startswith(
            f"error: video {first}: reward '{kind}' took longer than its time limit of 1 s"
        )

    def test_a_time_limit_is_a_time(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rank_module.main([str(folder), "--reward", "sprites", "--time-limit", "0"]) == 1
        assert (
            "error: --time-limit 0 is no time; give seconds above 0, or leave it out"
            in capsys.readouterr().err
        )
