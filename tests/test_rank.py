"""``python -m vpo_engine.rank``: folders of videos scored, preferences ranked, and what is refused."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vpo_engine.data.clips import find_clips, prompt_of_name, read_preferences
from vpo_engine.data.sprites.world import Attributes, render
from vpo_engine.metrics.ranking import rank_preferences
from vpo_engine.metrics.ranking_report import format_ranking, write_ranking_csv
from vpo_engine.rank import GLOBAL, main
from vpo_engine.rewards.kinds import NAMES
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesOfFiles
from vpo_engine.runs.video import write_mp4

CAPTIONS = ("a red circle moving left", "a blue square moving up")


def sprites(caption: str, seed: int = 0) -> Tensor:
    """A clean clip, uint8 [17, 32, 32, 3]."""
    return render(Attributes.of([caption]), torch.Generator().manual_seed(seed))[0]


def frozen(clip: Tensor) -> Tensor:
    return clip[:1].expand_as(clip).contiguous()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per caption a folder of a clean clip, the other caption and a frozen one; the clean ones are preferred."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number, caption in enumerate(CAPTIONS):
        (folder / str(number)).mkdir()
        clips = [frozen(sprites(caption, 1)), sprites(caption), sprites(CAPTIONS[1 - number], 2)]
        names = [f"{number}/{kind}.mp4" for kind in ("frozen", "clean", "other")]
        for name, clip in zip(names, clips, strict=True):
            write_mp4(folder / name, clip, 8)
        rows.append({"prompt": caption, "videos": names, "preferred": 1})
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips with their captions as names."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, caption in enumerate(CAPTIONS):
        write_mp4(videos / f"{number:04d}-{caption.replace(' ', '-')}-0.mp4", sprites(caption), 8)
    return videos


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of error of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


class TestScoring:
    def test_scores_of_a_folder(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert main([str(folder), "--reward", "sprites", "--out", str(out)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].split("  ")[-1] == GLOBAL
        assert table[-1].startswith("mean of 2 videos")
        rows = read_csv(out / "scores.csv")
        assert [row["prompt"] for row in rows] == list(CAPTIONS)
        assert list(rows[0]) == ["video", "prompt", *DIMENSIONS, GLOBAL]
        for row in rows:
            assert all(float(row[name]) > 3 for name in DIMENSIONS)
            assert float(row[GLOBAL]) == pytest.approx(sum(float(row[name]) for name in DIMENSIONS) / 5)

    def test_video_files_score_as_the_frames_they_came_from(self) -> None:
        """Enlarged, without the rounding of a video file: the same clip."""
        clip = sprites(CAPTIONS[0]).unsqueeze(0)
        large = clip.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        reward = SpritesOfFiles.from_pretrained()
        ours, exact = reward.score(large, CAPTIONS[:1]), reward.score(clip, CAPTIONS[:1])
        assert all(torch.equal(ours[name], exact[name]) for name in DIMENSIONS)

    def test_any_clip_with_the_builtin_reward(self, folder: Path, tmp_path: Path) -> None:
        """It reads no prompt, so a video without one is scored too."""
        write_mp4(folder / "7.mp4", sprites(CAPTIONS[0]), 8)
        out = tmp_path / "out"
        assert main([str(folder), "--reward", "builtin", "--out", str(out)]) == 0
        assert [row["prompt"] for row in read_csv(out / "scores.csv")] == [*CAPTIONS, ""]

    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--list"]) == 0
        assert [block.split("\n")[0] for block in capsys.readouterr().out.split("\n\n")] == list(NAMES)

    def test_nothing_to_do(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([])
        assert "give VIDEOS and --reward NAME, or --list" in capsys.readouterr().err


class TestPreferences:
    def test_ranking_with_sprites(
        self, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The clean clip is best overall; text alignment tells the other caption, dynamic degree the frozen clip."""
        arguments = [str(shared), "--reward", "sprites", "--preferences", str(shared / "preferences.jsonl")]
        assert main([*arguments, "--out", str(tmp_path)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert re.split(r"\s{2,}", table[0].strip()) == ["MRR", "recall@1", "recall@2", "recall@4"]
        (line,) = [line for line in table if line.startswith(GLOBAL)]
        assert re.split(r"\s{2,}", line)[1:] == ["100.00 [100.0, 100.0]"] * 4
        assert "chance" in table[-3]
        assert "61.11" in table[-3]  # of 3 candidates: (1 + 1/2 + 1/3) / 3
        assert table[-1].startswith("2 prompts; per cent, in brackets 95%")

        rows = {(row["score"], row["measure"]): row for row in read_csv(tmp_path / "ranking.csv")}
        assert rows[GLOBAL, "mrr"]["value"] == "1.0"
        assert {score for score, _ in rows} == {*DIMENSIONS, GLOBAL}
        scores = {row["video"]: row for row in read_csv(tmp_path / "scores.csv")}
        for number in range(2):
            assert float(scores[f"{number}/other.mp4"]["text_alignment"]) < 3
            assert float(scores[f"{number}/frozen.mp4"]["dynamic_degree"]) < 2
        assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "ranking.png").stat().st_size > 10_000

    def test_a_second_run_writes_the_same(self, shared: Path, tmp_path: Path) -> None:
        arguments = [str(shared), "--reward", "sprites", "--preferences", str(shared / "preferences.jsonl")]
        for out in ("one", "two"):
            assert main([*arguments, "--out", str(tmp_path / out)]) == 0
        for name in ("scores.csv", "ranking.csv", "ranking.png"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_one_prompt_has_no_interval(self, tmp_path: Path) -> None:
        rankings = {"only": rank_preferences([[1.0, 0.0, 2.0]], [0])}
        assert "50.00" in format_ranking(rankings)
        assert "50.00 [" not in format_ranking(rankings)
        write_ranking_csv(tmp_path / "r.csv", rankings)
        assert read_csv(tmp_path / "r.csv")[0] | {"chance": ""} == {
            "score": "only",
            "measure": "mrr",
            "value": "0.5",
            "low": "",
            "high": "",
            "chance": "",
            "prompts": "1",
        }

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: not JSON"),
            (
                '{"prompt": "p", "videos": ["0/clean.mp4"]}',
                'expected an object with "prompt", "videos" and "preferred"',
            ),
            ('{"prompt": " ", "videos": [], "preferred": 0}', "prompt is ' ', expected text"),
            ('{"prompt": "p", "videos": ["a"], "preferred": 0}', "expected at least two different files"),
            (
                '{"prompt": "p", "videos": ["a", "a"], "preferred": 0}',
                "expected at least two different files",
            ),
            (
                '{"prompt": "p", "videos": ["a", "b"], "preferred": 2}',
                "preferred is 2, expected a position from 0 to 1",
            ),
            (
                '{"prompt": "p", "videos": ["a", "b"], "preferred": true}',
                "preferred is True, expected a position",
            ),
            ('{"prompt": "p", "videos": ["0/clean.mp4", "b"], "preferred": 0}', "there is no video 'b' in"),
            ("", "holds no preferences; give one object per line"),
        ],
    )
    def test_bad_rows(self, shared: Path, tmp_path: Path, line: str, message: str) -> None:
        file = tmp_path / "preferences.jsonl"
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_preferences(file, shared)

    def test_missing_file(self, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
        absent = shared / "absent.jsonl"
        error = fails(capsys, shared, "--reward", "sprites", "--preferences", absent)
        assert f"there is no file of preferences at {absent}" in error


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "prompt"),
        [
            ("0003-a-red-circle-moving-left-1.mp4", "a red circle moving left"),
            ("runs/A cat, sleeping-0.mp4", "A cat, sleeping"),
            ("two_dogs.webm", "two dogs"),
            ("0003-1.mp4", ""),
        ],
    )
    def test_of_names(self, name: str, prompt: str) -> None:
        assert prompt_of_name(name) == prompt

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
    def test_of_files(self, folder: Path, kind: str) -> None:
        first, second = sorted(path.name for path in folder.iterdir())
        text = {
            "csv": f'video,prompt\n{second},"two, and\nmore"\n{first},one\n',
            "jsonl": f'{{"video": "{second}", "prompt": "two, and\\nmore"}}\n{{"video": "{first}", "prompt": "one"}}\n',
            "txt": "one\ntwo, and\n",
        }
        (folder / f"prompts.{kind}").write_text(text[kind])
        last = "two, and" if kind == "txt" else "two, and\nmore"
        assert [(clip.name, clip.prompt) for clip in find_clips(folder)] == [(first, "one"), (second, last)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("video,prompt\nx.mp4,a\n", "names video 'x.mp4', which is not in"),
            ("video,prompt\nA,a\n", "has no prompt for video '0001"),
            ("video,prompt\nA,a\nA,b\n", "twice; keep one row for each"),
            ("video,prompt\nA,a\nB, \n", "the prompt ('prompt') is empty"),
            ("video,text\nA,a\nB,b\n", "column 'prompt' occurs 0 times"),
        ],
    )
    def test_bad_files(self, folder: Path, text: str, message: str) -> None:
        first, second = sorted(path.name for path in folder.iterdir())
        (folder / "prompts.csv").write_text(text.replace("A,", f"{first},").replace("B,", f"{second},"))
        with pytest.raises(ValueError, match=re.escape(message)):
            find_clips(folder)

    def test_wrong_number_of_lines(self, folder: Path) -> None:
        (folder / "prompts.txt").write_text("one\n")
        with pytest.raises(ValueError, match=r"prompts\.txt has 1 prompts for 2 videos"):
            find_clips(folder)

    def test_two_prompt_files(self, folder: Path) -> None:
        for kind in ("csv", "txt"):
            (folder / f"prompts.{kind}").write_text("x")
        with pytest.raises(ValueError, match=r"has prompts\.csv and prompts\.txt; keep one"):
            find_clips(folder)


class TestRankRefusals:
    def test_folders(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "holds no videos; they must end in .mp4" in fails(capsys, tmp_path, "--reward", "sprites")
        absent = tmp_path / "absent"
        assert f"there is no folder of videos at {absent}" in fails(capsys, absent, "--reward", "sprites")

    def test_unknown_reward(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "there is no reward 'nice'; known are sprites," in fails(capsys, folder, "--reward", "nice")

    def test_weights(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        error = fails(capsys, folder, "--reward", "videoscore")
        assert (
            "reward 'videoscore' needs a path: a local folder with the weights published at TIGER-Lab"
            in error
        )
        error = fails(capsys, folder, "--reward", "videoscore", "--reward-path", folder)
        assert f"no config.json in {folder}" in error

    def test_corrupt_video(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = sorted(folder.iterdir())[0]
        whole = first.read_bytes()
        for damaged in (b"", b"no video at all", whole[: len(whole) // 2]):
            first.write_bytes(damaged)
            error = fails(capsys, folder, "--reward", "sprites")
            assert f"'{first}'" in error
            assert "is not a readable video file" in error or "has no frames" in error

    def test_video_of_one_frame(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mp4(folder / "9-a-red-circle-moving-left.mp4", sprites(CAPTIONS[0])[:1], 8)
        error = fails(capsys, folder, "--reward", "builtin")
        assert "video 9-a-red-circle-moving-left.mp4: videos have 1 frame, but temporal_consistency" in error

    def test_video_without_frames(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = sorted(folder.iterdir())[0]
        whole = first.read_bytes()
        first.write_bytes(whole[: whole.index(b"mdat") + 4])
        assert f"'{first}' has no frames" in fails(capsys, folder, "--reward", "sprites")

    def test_video_without_prompt(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mp4(folder / "0007-3.mp4", sprites(CAPTIONS[0]), 8)
        error = fails(capsys, folder, "--reward", "sprites")
        assert "video 0007-3.mp4 has no prompt, by which sprites judges; name it in prompts.csv" in error

    def test_prompt_of_another_world(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mp4(folder / "a-cat.mp4", sprites(CAPTIONS[0]), 8)
        assert "error: video a-cat.mp4: " in fails(capsys, folder, "--reward", "sprites")

    def test_mixed_frame_rates(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Refused by rewards that sample by seconds; the others do not look at the rate."""
        write_mp4(folder / "z-a-red-circle-moving-left.mp4", sprites(CAPTIONS[0]), 24)
        error = fails(capsys, folder, "--reward", f"{__name__}:FrameRate")
        assert (
            "has 8 frames per second and z-a-red-circle-moving-left.mp4 24, but test_rank:FrameRate samples by"
            in error
        )


class FrameRate:
    """Scores by the frames per second."""

    dimensions = ("fps",)

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def score(self, videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"fps": torch.full((len(prompts),), self.fps)}
