import errno
import io
import json
import math
import os

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vpo_engine.errors import DiskFullError
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.gallery import HeldOutGallery, write_held_out
from vpo_engine.runs.log import NullLog, RunLog, read_metrics


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create_at(tmp_path / "run", "{}")


def test_rows_come_back_and_reach_the_disk_at_once(run):
    log = RunLog(run)
    log.write(1, "train", {"loss": math.log(2), "pairs": 4, "reward/selected": -1.5})
    assert read_metrics(run.metrics) == [
        {"step": 1, "kind": "train", "loss": math.log(2), "pairs": 4, "reward/selected": -1.5}
    ]
    log.write(1, "eval", {"held_out/pixels/jitter": 1e-30})
    assert read_metrics(run.metrics)[1] == {"step": 1, "kind": "eval", "held_out/pixels/jitter": 1e-30}
    log.close()


def test_tensorboard_gets_the_same_numbers(run):
    with RunLog(run) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": step / 4, "reward/selected": float(step)})
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "reward/selected"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(run, value):
    with RunLog(run) as log:
        with pytest.raises(
            ValueError, match=r"metric 'grad_norm' of the train row at step 7 is -?(nan|inf), but only"
        ):
            log.write(7, "train", {"loss": 1.0, "grad_norm": value})
        with pytest.raises(ValueError, match="'grad_norm'"):
            NullLog().write(7, "train", {"grad_norm": value})
    assert read_metrics(run.metrics) == []


def test_resuming_drops_later_rows_and_leaves_no_duplicates(run):
    with RunLog(run) as log:
        for step in range(1, 6):
            log.write(step, "train", {"loss": float(step)})
            log.write(step, "eval", {"held_out/reward/selected": float(step)})
    with RunLog(run) as log:
        assert log.resume(3, last=9)
        for step in (4, 5):
            log.write(step, "train", {"loss": -float(step)})
    train = [(row["step"], row["loss"]) for row in read_metrics(run.metrics) if row["kind"] == "train"]
    assert train == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0), (5, -5.0)]
    assert [row["step"] for row in read_metrics(run.metrics) if row["kind"] == "eval"] == [1, 2, 3]
    assert not list(run.root.glob(".*"))
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.0, 2.0, 3.0, -4.0, -5.0]


def test_resuming_from_before_the_first_step(run):
    with RunLog(run) as log:
        log.write(0, "eval", {"held_out/reward/selected": 1.0})
        log.write(1, "train", {"loss": 1.0})
        assert not log.resume(0, last=9)
    assert read_metrics(run.metrics) == []


def test_resuming_after_the_last_step_drops_the_evaluation_at_the_end_alone(run):
    with RunLog(run) as log:
        for step in (1, 2):
            log.write(step, "train", {"loss": 1.0})
            log.write(step, "eval", {"held_out/reward/selected": 1.0})
        assert not log.resume(2, last=2)
    rows = [(row["step"], row["kind"]) for row in read_metrics(run.metrics)]
    assert rows == [(1, "train"), (1, "eval"), (2, "train")]


def test_resuming_says_whether_the_step_was_evaluated(run):
    with RunLog(run) as log:
        log.write(1, "train", {"loss": 1.0})
        assert not log.resume(1, last=9)


def test_an_unfinished_last_line_is_left_out_and_removed_on_resume(run, caplog):
    with RunLog(run) as log:
        log.write(1, "train", {"loss": 1.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "kind": "tr')
    assert [row["step"] for row in read_metrics(run.metrics)] == [1]
    assert "the last line was not finished" in caplog.text
    with RunLog(run) as log:
        log.resume(1, last=9)
        log.write(2, "train", {"loss": 2.0})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "text"),
    [("{oops}", "line 2 is not JSON"), ("[1]", "line 2 is not a row of metrics: it must be an object")],
)
def test_a_damaged_line_is_named(run, line, text):
    good = json.dumps({"step": 1, "kind": "train"})
    run.metrics.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=text):
        read_metrics(run.metrics)


def test_an_absent_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_videos_of_evaluations_can_be_followed_over_the_steps(run):
    dark, light = (torch.full((3, 16, 16, 3), level, dtype=torch.uint8) for level in (10, 200))
    with RunLog(run) as log:
        log.show_samples(0, ["a ball", "a cube"], [dark, dark, dark], 8)
        log.show_samples(20, ["a ball", "a cube"], [dark, dark, light], 8)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert events.Tags()["images"] == ["samples/00 a ball", "samples/01 a cube", "samples/02 a ball"]
    images = events.Images("samples/02 a ball")
    assert [image.step for image in images] == [0, 20]
    levels = [
        Image.open(io.BytesIO(image.encoded_image_string)).convert("L").getpixel((5, 5)) for image in images
    ]
    assert levels == [10, 200]


def test_rewards_share_a_chart_in_tensorboard(run):
    with RunLog(run) as log:
        log.write(1, "train", {"reward/selected": 1.0})
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    text = layout.tensor_proto.string_val[0].decode(errors="replace")
    assert "^reward/selected$" in text
    assert "^held_out/reward/selected$" in text
    assert "^held_out/judge/selected$" in text


def test_held_out_clips_move_in_tensorboard(run):
    before = torch.zeros(1, 4, 20, 30, 3, dtype=torch.uint8)
    before[0, 2, :, :10] = 255
    scores = [{"visual_quality": 1.0}]
    gallery = HeldOutGallery(before, before + 90, ["a ball"], scores, scores, 8, "3 steps")
    write_held_out(run.held_out_gallery, gallery)
    with RunLog(run) as log:
        log.show_held_out(48)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    (image,) = events.Images("held_out_clips/00 a ball")
    moving = Image.open(io.BytesIO(image.encoded_image_string))
    assert (image.step, moving.n_frames, moving.size, moving.info["duration"]) == (48, 3, (64, 20), 250)
    moving.seek(1)
    assert moving.convert("RGB").getpixel((5, 5)) == (255, 255, 255)
    assert moving.convert("RGB").getpixel((60, 5)) == (90, 90, 90)


def test_a_run_that_begins_again_shows_nothing_of_its_first_attempt_in_tensorboard(run):
    for loss in (1.0, 2.0):
        with RunLog(run) as log:
            log.resume(0, last=9)
            log.write(0, "eval", {"held_out/reward/selected": loss})
            for step in (1, 2):
                log.write(step, "train", {"loss": loss})
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [event.value for event in events.Scalars("held_out/reward/selected")] == [2.0]
    assert [event.value for event in events.Scalars("train/loss")] == [2.0, 2.0]


def test_a_disk_that_is_full_when_rows_are_synced_is_named(run, monkeypatch):
    log = RunLog(run)
    log.write(1, "train", {"loss": 1.0})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        log.sync()
