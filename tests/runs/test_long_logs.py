"""Logs that grow for weeks: parts of bounded size, a resume that reads the newest ones, a page of bounded size."""

from __future__ import annotations

import itertools
import json
import random
import re
from contextlib import closing
from pathlib import Path

import pytest
from full_disk import full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vpo_engine import line_files
from vpo_engine.data.preference_dataset import (
    DatasetWriter,
    StoredPair,
    read_dataset,
    truncate_dataset,
)
from vpo_engine.errors import DiskFullError
from vpo_engine.line_files import LineFile, parts, read_lines
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.log import RunLog, iterate_metrics, read_metrics
from vpo_engine.runs.report import write_report
from vpo_engine.runs.report_rows import MOST_POINTS, MetricRows


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create_at(tmp_path / "run", "{}")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "PART_BYTES", 200)


def write(run: RunDirectory, first: int, last: int, loss: float = 0.0) -> None:
    with RunLog(run) as log:
        log.resume(first - 1, last=99)
        for step in range(first, last + 1):
            log.write(step, "train", {"loss": loss + step})


def test_a_log_in_parts_is_one_log(run: RunDirectory, small_parts: None) -> None:
    write(run, 1, 20)
    names = [path.name for path in parts(run.metrics)]
    assert names == [f"metrics.{number:04d}.jsonl" for number in range(1, len(names))] + ["metrics.jsonl"]
    assert len(names) > 3
    assert all(path.stat().st_size < 300 for path in parts(run.metrics))
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(1, 21))
    assert len(list(run.tensorboard.iterdir())) > 3


@pytest.mark.parametrize("step", range(13), ids=lambda step: f"after step {step}")
def test_a_resume_cuts_parts_as_it_cuts_a_file(run: RunDirectory, small_parts: None, step: int) -> None:
    write(run, 1, 12)
    write(run, step + 1, 15, loss=0.5)
    expected = [(each, each + 0.5 * (each > step)) for each in range(1, 16)]
    assert [(row["step"], row["loss"]) for row in read_metrics(run.metrics)] == expected
    assert all(path.stat().st_size for path in parts(run.metrics)[:-1])
    assert not list(run.root.glob(".*"))


def test_tensorboard_reads_all_files_and_hides_what_was_cut(
    run: RunDirectory, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1_800_000_000)
    monkeypatch.setattr(
        "time.time", lambda: float(next(clock))
    )  # files are read in the order of their seconds
    write(run, 1, 12)
    write(run, 5, 15, loss=0.5)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    expected = [(step, step + 0.5 * (step > 4)) for step in range(1, 16)]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


def test_a_resume_reads_and_writes_the_newest_parts_alone(run: RunDirectory, small_parts: None) -> None:
    write(run, 1, 20)
    oldest = parts(run.metrics)[0]
    oldest.write_text("not read\n")
    write(run, 19, 20)
    assert oldest.read_text() == "not read\n"
    with pytest.raises(ValueError, match=r"metrics\.0001\.jsonl' line 1 is not JSON"):
        read_metrics(run.metrics)


def test_a_part_that_was_closed_just_before_a_kill(run: RunDirectory, small_parts: None) -> None:
    write(run, 1, 12)
    run.metrics.unlink()  # the part was renamed, and a new file was not begun
    left = [row["step"] for row in read_metrics(run.metrics)]
    write(run, len(left), 12)
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(1, 13))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_row_that_does_not_fit_on_the_disk_is_named(run: RunDirectory, name: str) -> None:
    with RunLog(run) as log:
        log.write(1, "train", {"loss": 1.0})
        with (
            full_disk(name),
            pytest.raises(DiskFullError, match=rf"full: could not write '.*{name}' \(\d+ bytes free"),
        ):
            log.write(2, "train", {"loss": 2.0})
        before = [1] if name == "metrics.jsonl" else [1, 2]
        assert [row["step"] for row in read_metrics(run.metrics)] == before


def stored(step: int) -> StoredPair:
    scores = {"motion": (0.5, 1.0)}
    return StoredPair(step, 7 * step, "a cat", 0, (0, 1), scores, (0.5, 1.0), 1, 0, 0.5, True, 1.0)


def test_a_dataset_in_parts_is_one_dataset(tmp_path: Path, small_parts: None) -> None:
    for rank in (0, 1):
        writer = DatasetWriter(tmp_path, rank)
        for step in range(1, 9):
            writer.write(step, [stored(step)])
    assert len(list(tmp_path.glob("pairs_0001*.jsonl"))) > 3
    assert [pair.step for pair in read_dataset(tmp_path)] == [step for step in range(1, 9) for _ in (0, 1)]
    truncate_dataset(tmp_path, 5)
    writer.write(6, [stored(6)])
    steps = [pair.step for pair in read_dataset(tmp_path)]
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


def test_parts_beyond_the_thousandth_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "PART_BYTES", 1)
    path = tmp_path / "lines.jsonl"
    (tmp_path / "lines.9999.jsonl").write_text("first\n")
    (tmp_path / "lines.old.jsonl").write_text("of somebody else\n")
    with closing(LineFile(path)) as file:
        file.append(b"second\n")
        file.append(b"third\n")
    assert [line.content for line in read_lines(path)] == [b"first\n", b"second\n", b"third\n"]


def test_the_page_of_ten_thousand_steps_is_small_and_true(run: RunDirectory) -> None:
    names = ("loss", "margin", "implicit_accuracy", "grad_norm", "lr", "reward/selected", "reward/gap")
    draw = random.Random(0)
    seconds = [draw.random() for _ in range(10_001)]
    with run.metrics.open("w") as file:
        for step, spent in enumerate(seconds, start=1):
            row = {"step": step, "kind": "train", "seconds/step": spent, "reference_age": step % 200}
            file.write(json.dumps(row | {name: step + draw.random() for name in names}) + "\n")
    page = write_report(run).read_text()
    assert len(page) < 1_000_000
    assert "Thin lines are means of 16 steps" in page
    rows = MetricRows(iterate_metrics(run.metrics))
    points = rows.points("train", "loss")
    assert len(points) <= MOST_POINTS + 3
    assert (points[0][0], points[-1][0]) == (1.0, 10_001.0)
    assert all(abs(x - y) < 2 for x, y in points)  # the mean of 16 steps, at their middle
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert rows.median("seconds/step") == sorted(seconds)[5000]
    assert rows.count("seconds/step") == 10_001
    assert rows.timings["step"] == pytest.approx(sum(seconds))
    assert rows.refreshes() == []
    assert re.search(r"10\D?001 steps", page)


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, MOST_POINTS + 2, 4 * MOST_POINTS + 3])
def test_a_short_series_is_shown_whole_and_a_longer_one_loses_no_value(count: int) -> None:
    rows = MetricRows({"step": step, "kind": "train", "loss": float(step)} for step in range(1, count + 1))
    points = rows.points("train", "loss")
    if count <= MOST_POINTS:
        assert points == [(float(step), float(step)) for step in range(1, count + 1)]
        return
    assert points[0] == (1.0, 1.0)
    assert points[-1] == (float(count), float(count))
    inner = points[1:-1]
    whole = rows.share * len(inner)
    assert count - whole < rows.share
    assert sum(y for _, y in inner) * rows.share == whole * (whole + 1) / 2
