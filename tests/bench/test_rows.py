"""Test rows of benchmarks: writing, replacing and reading them, telling machines apart, and their tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from report import START, duration, loss_table, main, markdown, plain_table, replace_rows, size, table
from rows import RESULTS, Environment, Row, commit, environment, quantiles, read, record

HERE = Environment(
    "CPU, AVX2", 2, "2.13.0", "3.9.0", "3.11.7", "abc1234", "2026-11-23T00:00:00+00:00", "pytest bench/"
)
ELSEWHERE = dataclasses.replace(HERE, hardware="NVIDIA H200")


def loss_row(implementation: str, seconds: float, origin: Environment = HERE, **numbers: float) -> Row:
    case = {"shape": "1x4", "dtypes": "bf16", "pass": "both", "implementation": implementation}
    measured = {
        "seconds": seconds,
        "low_seconds": seconds * 0.9,
        "high_seconds": seconds * 1.2,
        "peak_bytes": 2048,
        "moved_bytes": 1000,
        "bytes_per_second": 1000 / seconds,
        "copy_bytes_per_second": 1e6,
    }
    return Row("loss", case, {**measured, "operators": 3, **numbers}, origin)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [loss_row("eager", 0.1 + 0.2), loss_row("native", 1e-3, ELSEWHERE)]
    step = Row("step", {"world": "sprites"}, {"seconds": 5.0}, HERE)
    assert record([*rows, step], tmp_path) == [tmp_path / "loss.jsonl", tmp_path / "step.jsonl"]
    assert read(tmp_path) == {"loss": rows, "step": [step]}


def test_recording_replaces_the_same_case_on_the_same_machine_only(tmp_path: Path) -> None:
    kept = [loss_row("eager", 2e-3), loss_row("native", 1e-3, ELSEWHERE)]
    record([*kept, loss_row("native", 1e-3)], tmp_path)
    later = dataclasses.replace(HERE, commit="def5678", torch="2.14.0")
    record([loss_row("native", 5e-4, later)], tmp_path)
    assert read(tmp_path)["loss"] == [*kept, loss_row("native", 5e-4, later)]
    other_threads = dataclasses.replace(HERE, threads=1)
    record([loss_row("eager", 9.0, other_threads)], tmp_path)
    assert len(read(tmp_path)["loss"]) == 4


@pytest.mark.parametrize("line", ["{", "[]", '{"topic": "loss"}', '{"environment": {"gpu": "x"}}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    record([loss_row("eager", 1.0)], tmp_path)
    path = tmp_path / "loss.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        ValueError, match=r"loss\.jsonl, line 2 is not a row .*Delete the line and record again"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        record([loss_row("native", 1.0)], tmp_path)
    assert path.read_text().endswith(line + "\n")  # nothing is lost over it


def test_environment_names_the_machine() -> None:
    here = environment(torch.device("cpu"), "pytest bench/ --record")
    assert here.torch == torch.__version__
    assert here.threads == torch.get_num_threads()
    assert here.hardware
    assert here.command == "pytest bench/ --record"
    assert here.commit == commit() != ""


def test_commit_is_unknown_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rows.ROOT", tmp_path)
    assert commit() == "unknown"


def test_quantiles() -> None:
    assert quantiles(range(11)) == {"seconds": 5.0, "low_seconds": 2.0, "high_seconds": 8.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2e-6, "2 us"),
        (9.999e-4, "1000 us"),
        (1e-3, "1 ms"),
        (0.0123, "12.3 ms"),
        (1.0, "1 s"),
        (4321.0, "4321 s"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_read_well() -> None:
    assert [size(count) for count in (12, 2048, 1.5 * 2**20, 2**30)] == ["12 B", "2 KiB", "1.5 MiB", "1 GiB"]


def test_loss_table_compares_within_a_case() -> None:
    rows = [
        loss_row("eager", 4e-3),
        loss_row("compile", 2e-3, compile_seconds=3.0),
        loss_row("native", 1e-3),
    ]
    found = loss_table(rows)
    native = dict(zip(found.header, found.lines[2], strict=True))
    assert native["median"] == "1 ms"
    assert native["vs eager"] == "4.00x"
    assert native["vs compile"] == "2.00x"
    assert native["of copy"] == "100%"
    assert native["compile"] == ""
    assert "from idle" not in found.header  # GPU only
    assert dict(zip(found.header, found.lines[1], strict=True))["compile"] == "3 s"


def test_a_case_without_its_yardstick_shows_no_ratio() -> None:
    assert "vs eager" not in loss_table([loss_row("native", 1e-3)]).header


def test_columns_of_text_align() -> None:
    lines = loss_table([loss_row("eager", 4e-3), loss_row("native", 1e-5)]).text().splitlines()
    assert len({len(line) for line in lines}) == 1


def test_plain_table_shows_every_number() -> None:
    numbers = {"seconds": 5.0, "low_seconds": 4.5, "rollout_seconds": 0.25, "peak_bytes": 2048.0}
    found = plain_table([Row("step", {"world": "sprites"}, numbers, HERE)])
    assert found.header == ["world", "median", "20 %", "rollout", "peak bytes"]
    assert found.lines == [["sprites", "5 s", "4.5 s", "250 ms", "2 KiB"]]


def test_a_table_of_too_many_numbers_has_a_line_for_each() -> None:
    numbers = {f"part_{part}_bytes": 1024.0 * part for part in range(30)}
    found = table("soak", [Row("soak", {"model": name}, numbers, HERE) for name in ("own", "sprites")])
    assert found.header == ["model", "own", "sprites"]
    assert found.lines[1] == ["part 1 bytes", "1 KiB", "1 KiB"]
    assert len(found.lines) == 30


def test_markdown_names_machine_versions_commit_and_command(tmp_path: Path) -> None:
    record([loss_row("eager", 4e-3), loss_row("eager", 1e-5, ELSEWHERE)], tmp_path)
    text = markdown(read(tmp_path))
    assert text.startswith("## loss\n")
    assert (
        "CPU, AVX2, 2 threads; torch 2.13.0, triton 3.9.0, Python 3.11.7; commit abc1234, 2026-11-23" in text
    )
    assert "NVIDIA H200, 2 threads" in text
    assert "`pytest bench/`" in text


def test_replacing_rows_keeps_the_page_around_them() -> None:
    page = f"before\n{START}old\n<!-- end -->\nafter\n"
    once = replace_rows(page, "new\n")
    assert once == f"before\n{START}\nnew\n\n<!-- end -->\nafter\n"
    assert replace_rows(once, "new\n") == once
    with pytest.raises(ValueError, match="must hold one line '<!-- rows -->'"):
        replace_rows("before", "new")


def test_the_benchmark_page_holds_the_recorded_rows() -> None:
    """No row, no claim: after recording, ``python bench/report.py docs/benchmarks.md``."""
    page = (RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    assert replace_rows(page, markdown(read())) == page


def test_main_prints_what_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == markdown(read())
