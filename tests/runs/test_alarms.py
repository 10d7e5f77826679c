"""Test the file of alarms and the report's section about them."""

from __future__ import annotations

from pathlib import Path

from vpo_engine.runs.alarms import alarm_section, read_alarms, write_alarms
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.report_rows import MetricRows

ROWS = MetricRows([{"step": step, "kind": "train", "watch/motion": 1.5 - 0.1 * step} for step in range(1, 9)])


def test_an_alarm_of_the_watch_is_shown_with_its_curve_and_what_is_tolerated(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: run\n", encoding="utf-8")
    run = RunDirectory.open(tmp_path)
    old = {"step": 2, "kind": "style", "text": "clips look different", "metric": "", "limit": None}
    new = {
        "step": 6,
        "kind": "motion",
        "text": "set guards.motion_floor=0.9",
        "metric": "watch/motion",
        "limit": 1.2,
    }
    write_alarms(run, [old, new])
    alarms = read_alarms(run)
    assert alarms == [{key: old[key] for key in ("step", "kind", "text")}, new]
    page = alarm_section(alarms, {}, ROWS)
    assert '<b class="worse">The candidates move less</b>, step 6: set guards.motion_floor=0.9.' in page
    assert page.count("<figure") == 1
    assert ">tolerated</text>" in page
    assert "<h3>Motion</h3>" in page
    assert "<figure" not in alarm_section(alarms, {}, MetricRows([]))  # a log that was removed
