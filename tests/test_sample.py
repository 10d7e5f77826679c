"""``python -m vpo_engine.sample``: its record of prompts, which ``rank`` reads, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from before_torch import call_each
from video_cases import CASES

from vpo_engine import rank, sample
from vpo_engine.config import Config
from vpo_engine.config_file import dump_config
from vpo_engine.data.clips import PromptRecord, find_clips
from vpo_engine.runs import video
from vpo_engine.runs.checkpoint import save_checkpoint
from vpo_engine.runs.directory import RunDirectory

RED, BLUE = "a red circle moving left", "a blue square moving up"


@pytest.fixture
def quick(small: Callable[..., Config], tmp_path: Path) -> str:
    """A configuration that samples in one step."""
    path = tmp_path / "quick.yaml"
    path.write_text(dump_config(small("rollout.steps=1")))
    return str(path)


@pytest.fixture
def run(small: Callable[..., Config], tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 2 and 4, whose policies are no networks."""
    directory = RunDirectory.create_at(tmp_path / "runs" / "sprites-1", dump_config(small()))
    for step in (2, 4):
        save_checkpoint(
            directory.checkpoints,
            step,
            tensors={"optimizer": {"moment": torch.zeros(3)}},
            state={"step": step},
            write_policy=lambda folder: (folder / "model.safetensors").write_bytes(b"weights") and None,
            keep=2,
        )
    return directory.root


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of error of a command that must fail."""
    assert sample.main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def record(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_bytes().split(b"\n") if line]


class TestRecord:
    def test_what_was_sampled_is_what_is_judged(
        self, quick: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Long prompts, numbers at the start, other scripts, hyphens; line breaks and separators inside a prompt."""
        out, odd = tmp_path / "clips", "one\ntwo\u2028three \u201c\\"
        prompts = [*(CASES / "sampled_prompts.txt").read_text().splitlines(), odd]
        arguments = [
            quick,
            "--prompts",
            str(CASES / "sampled_prompts.txt"),
            "--out",
            str(out),
        ]
        assert sample.main([*arguments, "--prompt", f" {odd} "]) == 0
        shown = capsys.readouterr().out.splitlines()
        clips = find_clips(out)
        assert sorted(clip.prompt for clip in clips) == sorted(prompts)
        assert not any(clip.named for clip in clips)
        assert "红色圆圈向左移动" in (out / "prompts.jsonl").read_text()  # for people to read
        last = shown[-1]
        assert last.startswith(
            f"5 videos and their prompts (prompts.jsonl) are in {out}; open {shown[-6]}, or score"
        )
        assert rank.main([str(out), "--reward", "brisque", "--out", str(tmp_path / "ranking")]) == 0

    @pytest.mark.long
    def test_two_runs_into_one_folder(self, quick: str, tmp_path: Path) -> None:
        """Both keep their videos and rows; what is sampled again is there once."""
        out = ["--out", str(tmp_path)]
        for prompts in ([RED, BLUE], ["红"], ["蓝", BLUE], [RED]):
            given = [word for prompt in prompts for word in ("--prompt", prompt)]
            assert sample.main([quick, *given, *out]) == 0
        assert sorted(clip.prompt for clip in find_clips(tmp_path)) == sorted([RED, BLUE, "红", "蓝"])
        assert len(record(tmp_path)) == len(list(tmp_path.glob("*.mp4"))) == 4
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_a_run_that_is_stopped(
        self, quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Videos that are complete have their rows, and no video has another's."""
        arguments = [quick, "--prompt", RED, "--prompt", BLUE, "--out", str(tmp_path)]
        assert sample.main(arguments) == 0
        whole = video.write_mp4

        def stops_at_blue(path: Path, frames: torch.Tensor, fps: float) -> None:
            whole(path, frames, fps)
            if "blue" in path.name:
                raise KeyboardInterrupt

        monkeypatch.setattr(video, "write_mp4", stops_at_blue)
        assert sample.main([*arguments, "--seed", "1"]) == 130
        assert "stopped" in capsys.readouterr().err
        assert [row["prompt"] for row in record(tmp_path)] == [RED]
        with pytest.raises(
            ValueError, match=r"has no prompt for video '0001-a-blue-square-moving-up-0\.mp4'"
        ):
            find_clips(tmp_path)
        monkeypatch.undo()
        assert sample.main(arguments) == 0
        assert [clip.prompt for clip in find_clips(tmp_path)] == [RED, BLUE]

    def test_rows_of_others_stay_as_they_are(self, tmp_path: Path) -> None:
        """Also with more keys, and without a line break at the end."""
        row = '{"video": "mine.mp4", "prompt": "caf\u00e9\u2028bar", "seed": 3}'
        (tmp_path / "prompts.jsonl").write_text(row)
        mine, other = PromptRecord(tmp_path), PromptRecord(tmp_path)
        mine.begin(["a.mp4"])
        other.begin(["b.mp4"])
        mine.add("a.mp4", RED, Path.touch)
        other.add("b.mp4", BLUE, Path.touch)
        mine.begin(["b.mp4"])
        text = (tmp_path / "prompts.jsonl").read_text()
        assert text == f'{row}\n{{"video": "a.mp4", "prompt": "{RED}"}}\n'

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("prompts.jsonl", '{"video": "a.mp4", "prompt": "x"}\n{', "prompts.jsonl, line 2 is not JSON"),
            ("prompts.jsonl", '["a.mp4"]', 'prompts.jsonl, line 1 is no object with a "video"'),
            ("prompts.jsonl", '{"video": "a"}\n{"video": "./a"}', "line 2 names video 'a' a second time"),
            (
                "prompts.csv",
                "video,prompt\n",
                "has its prompts in prompts.csv, beside which prompts.jsonl would be",
            ),
        ],
    )
    def test_records_that_cannot_be_kept(
        self, tmp_path: Path, name: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / name).write_text(text)
        assert words in fails(capsys, "--prompt", RED, "--out", tmp_path)
        assert (tmp_path / name).read_text() == text


class TestCheckpoints:
    def test_one_that_was_altered(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        newest = run / "checkpoints" / "step_00000004"
        (newest / "policy" / "model.safetensors").write_bytes(b"weighty")
        for asked in (run, newest):
            error = fails(capsys, asked, "--prompt", RED)
            assert "model.safetensors' was altered after it was saved: its SHA-256 is" in error
            assert f"Use the earlier checkpoint '{newest.with_name('step_00000002')}'" in error

    def test_one_that_was_not_finished(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (run / "checkpoints" / "step_00000004" / "manifest.json").unlink()
        asked = run / "checkpoints" / "step_00000004"
        assert "has no manifest.json, so its saving was interrupted" in fails(capsys, asked, "--prompt", RED)

    def test_none(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.rmtree(run / "checkpoints")
        assert "has no complete checkpoint yet; wait until" in fails(capsys, run, "--prompt", RED)

    def test_a_folder_of_runs(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = f"{run.parent} holds 1 runs; give one of them, such as {run}"
        assert words in fails(capsys, run.parent, "--prompt", RED)

    def test_a_typing_error(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = f"there is no run, checkpoint, model, adapter or YAML file at {run}2; did you mean {run}?"
        assert words in fails(capsys, f"{run}2", "--prompt", RED)


class TestStart:
    ARGUMENTS = (
        (
            ["runs_nope"],
            1,
            "there is no run, checkpoint, model, adapter or YAML file at runs_nope; check the path",
        ),
        (
            ["model.policy=gone", "--prompt", RED],
            1,
            "model.policy=gone: there is no such folder or weights file; check the path (relative to",
        ),
        (
            ["model.policy=/gone", "--prompt", RED],
            1,
            "check the path; docs/tutorials says where models are published",
        ),
        (["RUN1", "RUN2"], 2, "give one RUN, got 2: RUN1, RUN2; call sample for each of them"),
        (["--count", "0"], 1, "--count 0 must be from 1 to 10000 videos for each prompt"),
        (["--prompt", " "], 1, "--prompt number 1 is ' '; give it words, or leave it out"),
        (["--prompts", "absent.txt"], 1, "absent.txt: there is no such prompt file; check the path"),
        (["--column", "name"], 2, "--column names a column of --prompts FILE; give that too"),
        (
            ["--prompts", "TXT", "--column", "name"],
            1,
            "has no columns, as a .txt holds a prompt a line",
        ),
        (
            ["--prompts", "CSV"],
            1,
            "set --column to one of its columns: 'id', 'name', 'prompt'",
        ),
        (
            ["--prompts", "CSV", "--column", "nam"],
            1,
            "column 'nam' occurs 0 times, but must occur once; set --column to one of its columns: 'id', 'name'",
        ),
    )

    def test_what_the_arguments_tell_needs_no_torch(self, tmp_path: Path) -> None:
        files = {"TXT": CASES / "sampled_prompts.txt", "CSV": CASES / "two_columns.csv"}
        calls = [[str(files.get(word, word)) for word in arguments] for arguments, _, _ in self.ARGUMENTS]
        said = call_each("vpo_engine.sample", calls, tmp_path)
        for (arguments, code, words), found in zip(self.ARGUMENTS, said, strict=True):
            assert (found.code, found.out, found.heavy) == (code, "", []), arguments
            assert words in found.errors, arguments
            assert "Traceback" not in found.errors, arguments

    def test_a_column_of_several(self, quick: str, tmp_path: Path) -> None:
        arguments = [quick, "--prompts", str(CASES / "two_columns.csv"), "--column", "prompt"]
        assert sample.main([*arguments, "--out", str(tmp_path / "clips")]) == 0
        rows = (CASES / "two_columns.csv").read_text().splitlines()[1:]
        assert [row["prompt"] for row in record(tmp_path / "clips")] == [row.split(",")[2] for row in rows]

    def test_prompts_that_are_not_utf8(self, capsys: pytest.CaptureFixture[str]) -> None:
        """As Python hands over bytes of a command line that it cannot decode."""
        assert "which is not UTF-8; write it as UTF-8" in fails(capsys, "--prompt", "caf\udce9")

    def test_a_file_in_the_place_of_the_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "clips").touch()
        assert "clips is a file; give a folder for the videos" in fails(capsys, "--out", tmp_path / "clips")


def test_every_video_has_noise_of_its_own_however_many_are_asked_for() -> None:
    model: Any = SimpleNamespace(latent_shape=(2, 1, 3, 3))
    drawn = [sample.starting_noise(model, seed, number, 2) for seed in (0, 1) for number in (0, 1, 2)]
    assert len({tuple(noise.flatten().tolist()) for both in drawn for noise in both}) == 2 * 3 * 2
    assert torch.equal(sample.starting_noise(model, 1, 2, 3)[:2], drawn[-1])


def test_processes_that_sample_into_one_folder_write_their_rows_in_turn(tmp_path: Path) -> None:
    """The other one has read the rows and will write them anew: a row that is added meanwhile would be lost."""
    mine = PromptRecord(tmp_path)
    mine.begin([])
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as thread:
        adding = thread.submit(mine.add, "a.mp4", RED, Path.touch)
        with pytest.raises(TimeoutError):
            adding.result(0.3)
        assert (tmp_path / "prompts.jsonl").read_text() == ""
        os.close(other)
        adding.result(60)
    assert [row["prompt"] for row in record(tmp_path)] == [RED]
