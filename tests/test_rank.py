"""``python -m vpo_engine.rank``: folders of videos scored, preferences ranked, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import video_cases
from before_torch import call_each
from rank_case import CAPTIONS, fails, read_csv, sprites
from torch import Tensor
from video_cases import moving

from vpo_engine.data.clips import find_clips, prompt_of_name
from vpo_engine.rank import GLOBAL, main
from vpo_engine.rewards.kinds import NAMES
from vpo_engine.rewards.sprites import DIMENSIONS, SpritesOfFiles
from vpo_engine.runs.video import write_mp4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips with their captions as names."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, caption in enumerate(CAPTIONS):
        write_mp4(videos / f"{number:04d}-{caption.replace(' ', '-')}-0.mp4", sprites(caption), 8)
    return videos


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

    @pytest.mark.long
    def test_any_clip_with_the_builtin_reward(self, folder: Path, tmp_path: Path) -> None:
        """It reads no prompt, so a video without one is scored too."""
        write_mp4(folder / "7.mp4", sprites(CAPTIONS[0]), 8)
        out = tmp_path / "out"
        assert main([str(folder), "--reward", "builtin", "--out", str(out)]) == 0
        assert [row["prompt"] for row in read_csv(out / "scores.csv")] == [*CAPTIONS, ""]

    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--list"]) == 0
        table, more = capsys.readouterr().out.split("\n\n")
        assert [line.split()[0] for line in table.splitlines()[1:]] == list(NAMES)
        assert more.startswith("--list NAME prints")

    def test_a_card(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--list", "brisque"]) == 0
        assert capsys.readouterr().out.startswith("brisque\n  dimensions      visual_quality (unbounded)\n")
        assert main(["--list", f"{__name__}:FrameRate"]) == 0
        assert "dimensions      fps (unbounded)" in capsys.readouterr().out
        assert "there is no reward 'brisk'; did you mean 'brisque'?" in fails(capsys, "--list", "brisk")

    def test_nothing_to_do(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([])
        assert "give VIDEOS and --reward NAME, or --list" in capsys.readouterr().err


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

    def test_columns_of_other_names(self, folder: Path) -> None:
        (folder / "prompts.csv").write_text("clip,prompt\na,b\n")
        message = "column 'video' occurs 0 times, but must occur once; give the name 'video' to one of its columns: "
        with pytest.raises(ValueError, match=re.escape(message)):
            find_clips(folder)

    def test_a_spreadsheets_file(self, folder: Path) -> None:
        """With a byte order mark and Windows line ends, a prompt over two lines, and text that is not English."""
        first, second = sorted(path.name for path in folder.iterdir())
        text = f'\ufeffvideo,prompt\r\n{first},"红色圆圈\r\nmoves"\r\n{second},"\u201ea\u2028b\u201c"\r\n'
        (folder / "prompts.csv").write_bytes(text.encode())
        assert [clip.prompt for clip in find_clips(folder)] == ["红色圆圈\r\nmoves", "\u201ea\u2028b\u201c"]

    def test_subfolders_with_their_own(self, folder: Path, tmp_path: Path) -> None:
        """As ``sample`` leaves them that wrote into several folders of one; a file above all counts alone."""
        first, second = sorted(folder.iterdir())
        for place, video in (("one", first), ("two/deep", second)):
            (folder / place).mkdir(parents=True)
            video.rename(folder / place / "v.mp4")
            row = {"video": "v.mp4", "prompt": f"Prompt of {place}!"}
            (folder / place / "prompts.jsonl").write_text(json.dumps(row))
        (folder / "a-blue-square.mp4").write_bytes((folder / "one" / "v.mp4").read_bytes())
        assert [(clip.name, clip.prompt, clip.named) for clip in find_clips(folder)] == [
            ("a-blue-square.mp4", "a blue square", True),
            ("one/v.mp4", "Prompt of one!", False),
            ("two/deep/v.mp4", "Prompt of two/deep!", False),
        ]
        (folder / "prompts.txt").write_text("x\ny\nz\n")
        assert [(clip.prompt, clip.named) for clip in find_clips(folder)] == [
            ("x", False),
            ("y", False),
            ("z", False),
        ]

    def test_prompts_of_file_names_are_announced_once(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By a reward that reads prompts, and only if there are such prompts."""
        arguments = [str(folder), "--out", str(tmp_path / "out"), "--reward"]
        assert main([*arguments, "sprites"]) == 0
        assert capsys.readouterr().err == (
            "note: the prompts of 2 of 2 videos are taken from their file names, such as 'a red circle moving left'; a "
            "prompts.jsonl or prompts.csv beside them is exact\n"
        )
        assert main([*arguments, "brisque"]) == 0
        (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
        assert main([*arguments, "sprites"]) == 0
        assert capsys.readouterr().err == ""


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
            assert "is not a readable video file" in error or "is damaged or incomplete" in error

    def test_video_of_one_frame(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mp4(folder / "9-a-red-circle-moving-left.mp4", sprites(CAPTIONS[0])[:1], 8)
        error = fails(capsys, folder, "--reward", "builtin")
        assert "video 9-a-red-circle-moving-left.mp4: videos have 1 frame, but temporal_consistency" in error

    def test_video_without_frames(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = sorted(folder.iterdir())[0]
        whole = first.read_bytes()
        first.write_bytes(whole[: whole.index(b"mdat") + 4])
        assert f"'{first}' has no frames that can be read" in fails(capsys, folder, "--reward", "sprites")

    def test_video_without_prompt(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mp4(folder / "0007-3.mp4", sprites(CAPTIONS[0]), 8)
        error = fails(capsys, folder, "--reward", "sprites")
        assert "video 0007-3.mp4 has no prompt, by which sprites judges; name it in prompts.csv" in error

    def test_prompt_of_another_world(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_mp4(folder / "a-cat.mp4", sprites(CAPTIONS[0]), 8)
        assert "error: video a-cat.mp4: " in fails(capsys, folder, "--reward", "sprites")

    def test_files_that_are_in_the_way(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        video = sorted(folder.iterdir())[0]
        assert f"{video} is a file; give the folder that holds the videos" in fails(
            capsys, video, "--reward", "brisque"
        )
        assert f"--out {video} is a file; give a folder" in fails(
            capsys, folder, "--reward", "brisque", "--out", video
        )
        (folder / "gone.mp4").symlink_to(folder / "absent.mp4")
        assert "gone.mp4 is a link to a file that is not there" in fails(
            capsys, folder, "--reward", "brisque"
        )


class TestFrameRates:
    """Of a reward that is made for one rate; those that come with the engine take each file's."""

    @pytest.fixture
    def mixed(self, folder: Path) -> Path:
        write_mp4(folder / "z-a-red-circle-moving-left.mp4", sprites(CAPTIONS[0]), 24)
        return folder

    @pytest.mark.parametrize("more", [(), ("--time-limit", "60")])
    @pytest.mark.long
    def test_each_clip_at_its_own(self, mixed: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
        out = tmp_path / "out"
        assert main([str(mixed), "--reward", f"{__name__}:FrameRate", "--out", str(out), *more]) == 0
        rows = read_csv(out / "scores.csv")
        assert [row["fps"] for row in rows] == ["8.0", "8.0", "24.0"]
        assert [row["video"] for row in rows] == sorted(path.name for path in mixed.iterdir())

    def test_preferences(self, mixed: Path, tmp_path: Path) -> None:
        names = sorted(path.name for path in mixed.iterdir())
        row = {"prompt": "p", "videos": [names[2], names[0]], "preferred": 0}
        (tmp_path / "preferred.jsonl").write_text(json.dumps(row))
        arguments = [str(mixed), "--reward", f"{__name__}:FrameRate", "--out", str(tmp_path / "out")]
        assert main([*arguments, "--preferences", str(tmp_path / "preferred.jsonl")]) == 0
        assert read_csv(tmp_path / "out" / "ranking.csv")[0]["value"] == "1.0"


class TestFolders:
    def test_what_people_do_not_see_is_left_out(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Hidden files, copies of notebooks, a Mac's metadata beside each file, also in archives."""
        first = sorted(folder.iterdir())[0]
        for name in (".a.mp4", "._a.mp4", ".ipynb_checkpoints/a.mp4", "__MACOSX/b.mp4", ".cache/b/a.mp4"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"no video")
        assert [clip.prompt for clip in find_clips(folder)] == list(CAPTIONS)
        hidden = tmp_path / ".videos"  # the folder itself may be hidden
        hidden.mkdir()
        (hidden / "a.mp4").write_bytes(first.read_bytes())
        assert main([str(hidden), "--reward", "brisque", "--out", str(tmp_path / "out")]) == 0
        assert "a.mp4" in capsys.readouterr().out
        (hidden / "a.mp4").rename(hidden / ".a.mp4")
        assert "holds no videos (1 hidden ones are left out)" in fails(capsys, hidden, "--reward", "brisque")

    @pytest.mark.parametrize(
        ("name", "codec"), [("a.gif", "gif"), ("A.MKV", "libx264"), ("a.m4v", "libx264")]
    )
    def test_other_kinds_of_files(self, tmp_path: Path, name: str, codec: str) -> None:
        videos = tmp_path / "videos"
        videos.mkdir()
        video_cases.write(
            videos / name.lower(), moving(10), codec=codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p"
        ).rename(videos / name)
        assert main([str(videos), "--reward", "brisque", "--out", str(tmp_path / "out")]) == 0
        assert [row["video"] for row in read_csv(tmp_path / "out" / "scores.csv")] == [name]

    def test_all_files_are_looked_at_before_the_reward_is_loaded(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The last one is damaged, and the reward could not be made either."""
        last = folder / "z-a-red-circle-moving-left.webm"
        last.write_bytes((video_cases.CASES / "truncated.webm").read_bytes())
        error = fails(capsys, folder, "--reward", "videoscore", "--reward-path", folder)
        assert f"'{last}' is damaged or incomplete" in error
        assert "20 of 40 declared frames" in error


class TestStart:
    ARGUMENTS = (
        (
            ["VIDEOS", "--reward", "pikscore"],
            "there is no reward 'pikscore'; did you mean 'pickscore'?",
        ),
        (["VIDEOS", "--reward", "PickScore"], "did you mean 'pickscore'?"),
        (["absent", "--reward", "brisque"], "there is no folder of videos at absent; check the path"),
        (
            ["VIDEOS", "--reward", "brisque", "--preferences", "absent"],
            "there is no file of preferences at absent",
        ),
        (["--list"], "what it judges"),
    )

    def test_what_the_arguments_tell_needs_no_torch(self, folder: Path) -> None:
        calls = [
            [str(folder) if word == "VIDEOS" else word for word in arguments]
            for arguments, _ in self.ARGUMENTS
        ]
        said = call_each("vpo_engine.rank", calls, folder, ("torch", "av"))
        for (arguments, words), found in zip(self.ARGUMENTS, said, strict=True):
            assert words in found.out + found.errors, arguments
            assert found.heavy == [], arguments


class FrameRate:
    """Scores by the frames per second."""

    dimensions = ("fps",)

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def score(self, videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"fps": torch.full((len(prompts),), self.fps)}
