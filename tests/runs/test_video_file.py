"""Video files as scorers read them: as players show them, refused where damaged, decoded as far as they are asked."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from video_cases import (
    CASES,
    changed_in_the_middle,
    half,
    moving,
    nine_tenths,
    write,
    zeros_at_the_end,
)

from vpo_engine.runs import video_file
from vpo_engine.runs.video import read_video
from vpo_engine.runs.video_file import VideoFile

ONE = 65536
TURNS = {
    "as it is": ((1, 0, 0, 1), lambda frame: frame),
    "90": ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
    "180": ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
    "270": ((0, 1, -1, 0), lambda frame: np.rot90(frame, 3)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    "transposed across": ((0, -1, -1, 0), lambda frame: np.rot90(frame.transpose(1, 0, 2), 2)),
    "zeros": ((0, 0, 0, 0), lambda frame: frame),
}
"""Display matrices (a, b, c, d), and what they do to a frame. Those without mirroring turn against the clock, as
``ffmpeg -display_rotation`` writes and ffmpeg's conversion to raw frames reads them."""


def as_stored(path: Path) -> list[np.ndarray]:
    """The frames of a plain decoder."""
    with av.open(str(path)) as container:
        return [
            frame.reformat(format="rgb24", interpolation=video_file.SCALER).to_ndarray()
            for frame in container.decode(video=0)
        ]


def close_to(found: Tensor, expected: Tensor, levels: int) -> bool:
    return found.shape == expected.shape and int((found.int() - expected.int()).abs().max()) <= levels


class TestAsShown:
    @pytest.mark.parametrize("turn", TURNS)
    @pytest.mark.parametrize("kind", [".mp4", ".mkv"])
    def test_turned_and_mirrored(self, tmp_path: Path, turn: str, kind: str) -> None:
        (a, b, c, d), expected = TURNS[turn]
        matrix = [a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30]
        if kind == ".mkv" and turn in ("transposed", "transposed across", "zeros"):
            pytest.skip("Matroska stores an angle and a mirroring, which PyAV does not write together")
        path = write(
            tmp_path / f"a{kind}", moving(3), prepare=lambda stream: stream.set_display_matrix(matrix)
        )
        frames, _ = read_video(path)
        shown = [expected(frame) for frame in as_stored(path)]
        assert torch.equal(frames, torch.from_numpy(np.stack(shown)))

    def test_the_clip_of_the_report(self) -> None:
        frames, fps = read_video(CASES / "rotated.mp4")
        assert frames.shape == (16, 320, 240, 3)
        assert fps == 10
        assert torch.equal(
            frames, torch.from_numpy(np.stack([np.rot90(f) for f in as_stored(CASES / "rotated.mp4")]))
        )

    def test_an_angle_that_is_no_quarter_turn(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.mp4", moving(3), prepare=lambda stream: stream.set_display_rotation(30))
        with pytest.raises(
            ValueError, match=r"a\.mp4' is to be shown at an angle of -?30 degrees; write it anew"
        ):
            VideoFile.open(path)

    @pytest.mark.parametrize(("aspect", "width"), [("4/3", 85), ("1/2", 32), ("1/1", 64)])
    def test_pixels_become_squares(self, tmp_path: Path, aspect: str, width: int) -> None:
        def mark(stream) -> None:  # type: ignore[no-untyped-def]
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)

        clip = moving(2)
        frames, _ = read_video(write(tmp_path / "a.mp4", clip, prepare=mark))
        assert frames.shape == (2, 48, width, 3)
        columns = ((torch.arange(width) + 0.5) * 64 / width - 0.5).round().long()
        assert (frames.float() - clip[:, :, columns.clamp(0, 63)].float()).abs().mean() < 6

    @pytest.mark.parametrize(
        ("matrix", "full"), [("ITU601", False), ("ITU601", True), ("ITU709", False), ("ITU709", True)]
    )
    def test_colours_are_those_that_the_file_names(self, tmp_path: Path, matrix: str, full: bool) -> None:
        colours = torch.tensor(
            [[230, 40, 30], [20, 200, 60], [40, 50, 220], [128, 128, 128]], dtype=torch.uint8
        )
        clip = colours.view(4, 1, 1, 3).expand(4, 48, 64, 3).contiguous()

        def mark(stream) -> None:  # type: ignore[no-untyped-def]
            stream.codec_context.colorspace = 1 if matrix == "ITU709" else 5
            stream.codec_context.color_range = 2 if full else 1

        path = write(
            tmp_path / "a.mp4",
            clip,
            options={"crf": "1"},
            prepare=mark,
            dst_colorspace=matrix,
            dst_color_range="JPEG" if full else "MPEG",
        )
        assert close_to(read_video(path)[0], clip, 4)

    def test_frames_of_several_sizes(self, tmp_path: Path) -> None:
        parts = [write(tmp_path / f"{side}.h264", moving(3, side, 64)).read_bytes() for side in (48, 64)]
        (tmp_path / "a.h264").write_bytes(b"".join(parts))
        with pytest.raises(
            ValueError, match=r"changes its frames from 48 x 64 to 64 x 64 at frame 3; write it anew"
        ):
            VideoFile.open(tmp_path / "a.h264")

    def test_a_name_like_an_address(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A colon is no protocol, and a per cent sign no pattern."""
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a.mp4", moving(3)).rename("12:30 %d.mp4")
        assert len(read_video(Path("12:30 %d.mp4"))[0]) == 3


KINDS = {
    "mp4": ("libx264", ".mp4"),
    "hevc": ("libx265", ".mp4"),
    "webm": ("libvpx-vp9", ".webm"),
    "vp8": ("libvpx", ".webm"),
    "mkv": ("libx264", ".mkv"),
    "avi": ("libx264", ".avi"),
    "divx": ("mpeg4", ".avi"),
    "mjpeg": ("mjpeg", ".avi"),
    "gif": ("gif", ".gif"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of 20 frames of each kind."""
    folder, clip = tmp_path_factory.mktemp("files"), moving(20, 96, 128)
    clip = clip ^ torch.randint(0, 32, clip.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    formats = {"gif": "rgb8", "mjpeg": "yuvj420p"}
    return {
        kind: write(folder / f"{kind}{suffix}", clip, codec=codec, pix_fmt=formats.get(kind, "yuv420p"))
        for kind, (codec, suffix) in KINDS.items()
    }


class TestDamage:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("damage", [half, nine_tenths, zeros_at_the_end])
    def test_incomplete_files(self, files: dict[str, Path], tmp_path: Path, kind: str, damage) -> None:  # type: ignore[no-untyped-def]
        assert VideoFile.open(files[kind]).shape[1] == 20
        path = tmp_path / files[kind].name
        path.write_bytes(damage(files[kind].read_bytes()))
        with pytest.raises(
            ValueError, match=r"is damaged or incomplete|no frames that can be read"
        ) as caught:
            VideoFile.open(path)
        assert f"'{path}'" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "divx", "mjpeg", "gif"])
    def test_changed_bytes(self, files: dict[str, Path], tmp_path: Path, kind: str) -> None:
        """VP9 and HEVC decode anything, so nobody can tell."""
        path = tmp_path / files[kind].name
        path.write_bytes(changed_in_the_middle(files[kind].read_bytes()))
        with pytest.raises(
            ValueError, match=r"is damaged or incomplete: .* \d+ of \d+ declared frames can be read"
        ):
            VideoFile.open(path)

    def test_the_clip_of_the_report(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"truncated\.webm' is damaged or incomplete: it should have 149,637 bytes, but has 74,818; "
            r"20 of 40 declared frames can be read; copy or download the file again",
        ):
            VideoFile.open(CASES / "truncated.webm")

    @pytest.mark.parametrize(
        ("name", "frames", "fps"),
        [
            ("edit_list.mp4", 26, 10),
            ("variable_rate.mp4", 40, 400 / 79),
            ("no_duration.mkv", 40, 10),
            ("longer_sound.mkv", 40, 10),
            ("clock_rate.avi", 12, 10),
        ],
    )
    def test_odd_files_that_are_whole(self, name: str, frames: int, fps: float) -> None:
        file = VideoFile.open(CASES / name)
        assert file.shape == (1, frames, 48, 64, 3)
        assert file.fps == pytest.approx(fps)

    def test_reading_says_nothing_of_its_own(
        self, files: dict[str, Path], capfd: pytest.CaptureFixture[str]
    ) -> None:
        level = av.logging.get_level()
        VideoFile.open(files["mp4"])
        assert av.logging.get_level() == level
        assert capfd.readouterr() == ("", "")


class TestIndexing:
    @pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
    def test_is_that_of_a_tensor(self, files: dict[str, Path], kind: str) -> None:
        file = VideoFile.open(files[kind])
        whole = read_video(files[kind])[0].unsqueeze(0)
        assert file.shape == whole.shape
        assert (file.ndim, file.dtype, file.device, len(file)) == (5, whole.dtype, whole.device, 1)
        assert torch.equal(file[:, :], whole)
        for indices in ([3], [0, 5, 19], [7, 2, 2, 11], []):
            assert torch.equal(file[0:1, indices], whole[0:1, indices])
        assert file[1:2, [4]].shape == (0, 1, *whole.shape[2:])
        rows, columns = torch.zeros(3, dtype=torch.long), torch.tensor([8, 1, 9])
        assert torch.equal(file[rows, columns], whole[rows, columns])

    def test_decodes_no_frame_twice_without_need(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests in order go on where the last one stopped, and only what is asked for is converted."""
        file, opened, converted = VideoFile.open(files["mp4"]), [], []
        decoded, shown = video_file._decoded, video_file._as_shown
        monkeypatch.setattr(video_file, "_decoded", lambda path: opened.append(path) or decoded(path))
        monkeypatch.setattr(
            video_file, "_as_shown", lambda frame, *rest: converted.append(frame.pts) or shown(frame, *rest)
        )
        for indices in ([1, 4], [5], [9, 12]):
            file[:, indices]
        assert (len(opened), len(converted)) == (1, 5)
        file[:, [0]]
        assert (len(opened), len(converted)) == (2, 6)

    def test_closing_gives_the_file_back(self, files: dict[str, Path]) -> None:
        def open_files() -> int:
            return sum(os.path.samefile(f"/proc/self/fd/{fd}", files["mp4"]) for fd in found())

        def found() -> list[str]:
            return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]

        file = VideoFile.open(files["mp4"])
        assert open_files() == 0
        first = file[:, [2]]
        assert open_files() == 1
        file.close()
        assert open_files() == 0
        assert torch.equal(file[:, [2]], first)

    def test_a_file_that_changes_meanwhile(self, files: dict[str, Path], tmp_path: Path) -> None:
        path = tmp_path / "a.mkv"
        path.write_bytes(files["mkv"].read_bytes())
        file = VideoFile.open(path)
        path.write_bytes(half(path.read_bytes()))
        with pytest.raises(ValueError, match=r"a\.mkv' was changed while it was read"):
            file[:, [19]]

    def test_another_process_knows_it_by_its_fields(self, files: dict[str, Path]) -> None:
        file = VideoFile.open(files["mp4"])
        copy = VideoFile.from_fields(file.to_fields())
        assert (copy.shape, copy.fps) == (file.shape, file.fps)
        assert torch.equal(copy[:, [3]], file[:, [3]])


class TestHostileFiles:
    @pytest.mark.parametrize(
        "content",
        [
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
            "ffconcat version 1.0\nfile '{other}'\n",
        ],
        ids=["hls", "concat"],
    )
    def test_playlists_open_no_other_files(
        self, tmp_path: Path, files: dict[str, Path], content: str
    ) -> None:
        path = tmp_path / "hostile.mp4"
        path.write_text(content.format(other=files["mp4"]))
        with pytest.raises(ValueError, match=r"hostile\.mp4' is not a readable video file"):
            VideoFile.open(path)

    def test_a_header_that_claims_large_frames(self, tmp_path: Path) -> None:
        path = write(tmp_path / "large.gif", moving(2, 32, 48), codec="gif", pix_fmt="rgb8")
        content = bytearray(path.read_bytes())
        content[6:10] = struct.pack("<HH", 65535, 65535)
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"large\.gif' (has frames of 65535 x 65535 pixels|has no frames that can be read)",
        ):
            VideoFile.open(path)

    def test_a_video_that_is_shown_wider_than_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The limit is that of the frames as they are shown, too: a ratio of pixels can be any number."""

        def wide(stream) -> None:  # type: ignore[no-untyped-def]
            stream.codec_context.sample_aspect_ratio = Fraction(4)

        path = write(tmp_path / "wide.mp4", moving(2), prepare=wide)
        monkeypatch.setattr(video_file, "MOST_PIXELS", 2 * 48 * 64)
        with pytest.raises(
            ValueError, match=r"wide\.mp4' has frames of 48 x 256 pixels, and frames are read up to"
        ):
            VideoFile.open(path)

    @pytest.mark.parametrize(("limit", "value"), [("MOST_FRAMES", 3), ("MOST_IN_ALL", 96 * 128 * 3)])
    def test_endless_videos(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, limit: str, value: int
    ) -> None:
        monkeypatch.setattr(video_file, limit, value)
        with pytest.raises(ValueError, match=r"has more than 3 frames of 96 x 128 pixels, .*; cut it"):
            VideoFile.open(files["mp4"])

    def test_frames_that_do_not_fit_into_memory(self, files: dict[str, Path]) -> None:
        file = VideoFile(files["mp4"], 1 << 30, 1 << 13, 1 << 13, 10.0)
        with pytest.raises(
            ValueError, match=r"1073741824 frames of 8192 x 8192 pixels take \d+ bytes, and this"
        ):
            file[:, :]
