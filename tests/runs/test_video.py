import av
import pytest
import torch

from vpo_engine.runs.video import enlarge, read_video, write_mp4


def smooth_clip(frames: int, height: int, width: int):
    f, y, x = (torch.arange(n) for n in (frames, height, width))
    red = 40 + 60 * x / width + 3 * f.view(-1, 1, 1)
    green = 60 + 90 * y.view(1, -1, 1) / height
    blue = 120 + 40 * torch.sin(x / 20 + f.view(-1, 1, 1) / 3)
    channels = [channel.expand(frames, height, width) for channel in (red, green, blue)]
    return torch.stack(channels, dim=3).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "stored"),
    [
        (256, 320, (256, 320)),
        (257, 301, (258, 302)),
        (240, 424, (240, 424)),  # videos of real models are written as they were made
        (128, 130, (128, 130)),
        (127, 140, (382, 420)),
        (33, 47, (264, 376)),
        (32, 32, (256, 256)),
        (5, 7, (260, 364)),
    ],
)
def test_clips_come_back_nearly_unchanged(tmp_path, height, width, stored):
    clip = smooth_clip(9, height, width)
    write_mp4(tmp_path / "clip.mp4", clip, 8)
    back, fps = read_video(str(tmp_path / "clip.mp4"))
    assert fps == 8
    assert back.shape == (9, *stored, 3)
    assert back.dtype == torch.uint8
    expected = enlarge(clip, stored[0] // height if height < 256 else 1)
    error = (back[:, : expected.shape[1], : expected.shape[2]].int() - expected.int()).abs()
    # Quantisation to limited-range YUV costs up to two levels, the encoder a little more.
    assert error.float().mean() < 1.0
    assert error.float().quantile(0.99) <= 4
    bias = (back[:, : expected.shape[1], : expected.shape[2]].float() - expected.float()).mean()
    assert abs(bias) < 0.3


def test_an_odd_size_repeats_its_last_row_and_column(tmp_path):
    clip = smooth_clip(3, 257, 301)
    write_mp4(tmp_path / "clip.mp4", clip, 8)
    back, _ = read_video(tmp_path / "clip.mp4")
    assert (back[:, 257].int() - back[:, 256].int()).abs().max() <= 4
    assert (back[:, :, 301].int() - back[:, :, 300].int()).abs().max() <= 4


@pytest.mark.parametrize("fps", [8, 7.5, 24, 29.97])
def test_the_frame_rate_is_constant_and_kept(tmp_path, fps):
    write_mp4(tmp_path / "clip.mp4", smooth_clip(17, 64, 64), fps)
    assert read_video(tmp_path / "clip.mp4")[1] == pytest.approx(fps, rel=1e-6)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p", "what every browser plays"
    gaps = torch.tensor(times).diff()
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / fps), atol=1e-3)


def test_enlarging_makes_squares():
    clip = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3)
    big = enlarge(clip, 3)
    assert big.shape == (1, 6, 6, 3)
    assert (big[0, :3, 3:] == clip[0, 0, 1]).all()


@pytest.mark.parametrize(
    "clip",
    [
        torch.zeros(3, 8, 8, 3),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(0, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_what_is_not_a_clip(tmp_path, clip):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[F, H, W, 3\], not empty, got"):
        write_mp4(tmp_path / "clip.mp4", clip, 8)


def test_a_frame_rate_of_zero(tmp_path):
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        write_mp4(tmp_path / "clip.mp4", smooth_clip(2, 8, 8), 0)


def test_what_is_not_a_video_file(tmp_path):
    (tmp_path / "clip.mp4").write_text("no video here, only words")
    with pytest.raises(ValueError, match="is not a readable video file"):
        read_video(tmp_path / "clip.mp4")
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "absent.mp4")
