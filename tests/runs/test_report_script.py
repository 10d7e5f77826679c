"""The script of the report, in a browser: clips on one clock, charts that answer, commands that are copied."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_run

from vpo_engine.runs.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the path"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with few clips."""
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "sprites-7", gallery=2))


def opened(page: Path, folder: Path, *options: str) -> str:
    """Return the document as it is once the page's scripts have run."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def found(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what ``report_in_browser.js`` saw. The page's security policy would forbid it, and is taken out."""
    folder, source = tmp_path_factory.mktemp("used"), page.read_text(encoding="utf-8")
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    before, script, after = source.rpartition("<script>")
    clock, used = (
        (HERE / name).read_text(encoding="utf-8") for name in ("report_clock.js", "report_in_browser.js")
    )
    after = after.replace("</body>", f"<script>{used}</script></body>")
    (folder / "page.html").write_text(f"{before}<script>{clock}</script>{script}{after}", encoding="utf-8")
    said = re.search(r'data-found="([^"]*)"', opened(folder / "page.html", folder))
    assert said is not None
    seen: dict[str, Any] = json.loads(html.unescape(said[1]))
    assert "error" not in seen, seen["error"]
    return seen


@pytest.mark.parametrize(
    ("options", "button"), [((), "Pause"), (("--force-prefers-reduced-motion",), "Play")]
)
def test_the_policy_of_the_page_lets_its_script_run(
    page: Path, tmp_path: Path, options: tuple[str, ...], button: str
) -> None:
    """Clips play at once, but for those who asked their system for less motion."""
    document = opened(page, tmp_path, *options)
    assert f">{button}</button>" in document
    assert re.search(r"<output[^>]*>frame \d+/17</output>", document)


def test_all_clips_show_the_frame_of_one_clock(found: dict[str, Any]) -> None:
    """17 frames at 8 a second; at a quarter of the speed, two a second."""
    assert found["canvases"] > 2
    frames = {"start": 0, "second": 8, "slow": 10, "paused": 10, "chosen": 16, "around": 1}
    for name, frame in frames.items():
        seen = found[name]
        assert (seen["slider"], seen["output"]) == (frame, f"frame {frame + 1}/17"), name
        assert seen["right"], f"{name}: a canvas shows another frame"
    assert [found[name]["button"] for name in frames] == ["Pause", "Pause", "Pause", "Play", "Play", "Pause"]


def test_a_chart_tells_the_values_of_the_step_that_is_chosen(found: dict[str, Any]) -> None:
    data, chart = found["data"], found["chart"]
    steps = sorted({step for series in data["series"] for step, _ in series})
    expected = {
        "home": steps[0],
        "right": steps[1],
        "end": steps[-1],
        "beyond": steps[-1],
        "left": steps[-2],
        "pointed": min(steps, key=lambda step: abs(step - 31)),
        "between": min(steps, key=lambda step: abs(step - 11.6)),
    }
    for name, step in expected.items():
        seen = chart[name]
        assert (seen["at"], seen["now"], seen["on"]) == (f"step {step}", str(step), True), name
        share = (step - data["first"]) / (data["last"] - data["first"])
        assert seen["x"] == pytest.approx(data["left"] + share * (data["right"] - data["left"])), name
        for shown, series in zip(seen["values"], data["series"], strict=True):
            own, value = min(series, key=lambda point: (abs(point[0] - step), point[0]))
            number = re.match(r"-?[\d.e-]+", shown)
            assert number is not None
            assert float(number[0]) == pytest.approx(value * (100 if data["percent"] else 1), rel=1e-3), name
            assert ("(step" in shown) == (own != step), name
    for name in ("escaped", "away"):
        assert chart[name] | {"x": 0, "now": ""} == chart["before"] | {"x": 0, "now": ""}, name


def test_a_command_is_copied_or_selected(found: dict[str, Any]) -> None:
    code = found["copy"]["code"]
    assert not found["copy"]["hidden"]
    assert found["copy"]["copied"] == ["Copied", code]
    assert found["copy"]["selected"] == ["Selected", code]
    assert found["scripted"] == [False] * len(found["scripted"])
