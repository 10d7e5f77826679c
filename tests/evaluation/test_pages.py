"""The page of an evaluation and the page of a study, driven in a headless browser from their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from evaluation_case import PROMPTS, results_of, run, videos

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt install chromium)")

SCREENS = [(1280, False), (1280, True), (390, False), (390, True)]
"""Widths in pixels, and whether the user prefers dark pages."""
SHOWN = [
    pytest.param(*screen, marks=[pytest.mark.long] if screen in SCREENS[1:3] else []) for screen in SCREENS
]
VOTING = [
    pytest.param(*screen, marks=[pytest.mark.long] if screen != (390, True) else []) for screen in SCREENS
]
SHARPNESS = "pixels/sharpness"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of two folders of videos."""
    root = tmp_path_factory.mktemp("comparison")
    bright, dim = videos(root / "bright", 160), videos(root / "dim", 120)
    out = root / "out"
    assert run(bright, "--baseline", dim, "--metrics", "pixels,proxy_flicker", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def study(comparison: Path) -> Path:
    """The folder of the same evaluation, with a study of all its pairs."""
    assert run("--study", comparison, "--pairs", "8", "--seed", "5") == 0
    return comparison


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), SHOWN)
def test_the_page_plays_sorts_and_shows_the_numbers(
    browser: Browser, comparison: Path, width: int, dark: bool
) -> None:
    browser.show(width, dark=dark, touch=width < 600)
    browser.open(comparison / "evaluation.html")
    results = results_of(comparison)
    assert browser.run("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 20, 23)") is dark
    row = browser.run(f"document.querySelector('tr[data-measure=\"{SHARPNESS}\"]').innerText")
    found = results["measures"][SHARPNESS]["comparison"]
    assert f"{found['difference']:+.3f}" in row
    assert f"{found['low']:+.3f}, {found['high']:+.3f}" in row
    browser.run("document.querySelector('#videos').scrollIntoView()")
    browser.wait("document.querySelectorAll('canvas[data-ready]').length >= 2")
    first = browser.run("document.querySelector('#videos output').textContent")
    browser.wait(f"document.querySelector('#videos output').textContent !== '{first}'")
    browser.run("document.querySelector('.play').click()")
    assert browser.run("document.querySelector('.play').textContent") == "Play"
    differences = {}
    for each in results["videos"]:
        values = [each[role]["values"][SHARPNESS] for role in ("policy", "baseline")]
        differences[each["prompt"], f"number {each['index']}"] = values[0] - values[1]
    expected = sorted(differences.values(), reverse=True)
    _sort_by(browser, SHARPNESS)
    assert _keys(browser) == pytest.approx(expected)
    browser.run("document.querySelector('.order').click()")
    assert _keys(browser) == pytest.approx(expected[::-1])
    texts = browser.run("[...document.querySelectorAll('.card')].map(card => card.innerText)")
    lowest = min(differences, key=lambda key: differences[key])
    assert lowest[0] in texts[0]
    _sort_by(browser, "")
    prompts = browser.run("[...document.querySelectorAll('.card .prompt')].map(each => each.textContent)")
    assert prompts == [each["prompt"] for each in results["videos"]]
    assert browser.errors == []


def test_the_page_shows_the_pixels_of_the_files(browser: Browser, comparison: Path) -> None:
    """The middle of a frame in the page is that of the policy's or the baseline's file, and not the other's."""
    from vpo_engine.runs.video import read_video

    browser.show(1280)
    browser.open(comparison / "evaluation.html")
    _sort_by(browser, "")
    browser.run("document.querySelector('#videos').scrollIntoView()")
    browser.wait("document.querySelectorAll('.card:first-child canvas[data-ready]').length === 2")
    browser.run("slider => 0, document.querySelector('#videos input[type=range]').value = 4")
    browser.run("document.querySelector('#videos input[type=range]').dispatchEvent(new Event('input'))")
    row = results_of(comparison)["videos"][0]
    for place, role in enumerate(("baseline", "policy")):
        frame = read_video(comparison / row[role]["file"])[0][4]
        shown = browser.run(
            f"[...document.querySelectorAll('.card:first-child canvas')[{place}].getContext('2d')"
            ".getImageData(12, 12, 1, 1).data].slice(0, 3)"
        )
        assert shown == frame[12, 12].tolist()


@pytest.mark.parametrize(("width", "dark"), VOTING)
def test_people_vote_and_the_votes_give_the_numbers(
    browser: Browser, study: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    """One votes by keys, the other by touch; the saved files give win rates that are counted by hand."""
    phone = width < 600
    browser.show(width, dark=dark, touch=phone)
    page = study / "study" / "index.html"
    browser.open(page)
    browser.run("localStorage.clear()")
    browser.open(page)
    key = json.loads((study / "study_key.json").read_text())
    pairs = list(key["pairs"])
    shutil.rmtree(browser.downloads, ignore_errors=True)
    choices = ["left", "right", "tie", "left", "left", "tie", "right", "right"]
    _start(browser, "Ann")
    for number, choice in enumerate(choices):
        assert browser.run("document.querySelector('.count').textContent") == f"{number + 1} of {len(pairs)}"
        _both_play(browser)
        assert browser.run("document.documentElement.scrollWidth") <= width
        if phone:
            browser.touch(f".choose[data-choice={choice}]")
        else:
            browser.press({"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}[choice])
        if number == 3:  # the page is closed in the middle, and goes on where it was
            browser.open(page)
            assert browser.run("document.querySelector('#rater').value") == "Ann"
            _start(browser, "Ann")
            browser.press("ArrowUp")
            assert browser.run("document.querySelector('.choose.chosen').dataset.choice") == choice
            browser.press({"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}[choice])
    browser.wait("!document.querySelector('.end').hidden")
    browser.run("document.querySelector('.save.main').click()")
    file = _saved(browser, "Ann")
    content = json.loads(file.read_text())
    assert [(vote["pair"], vote["choice"]) for vote in content["votes"]] == list(
        zip(pairs, choices, strict=True)
    )
    assert content["complete"] is True
    _check_report(study, file, tmp_path, key, choices)
    assert browser.errors == []


def _check_report(study: Path, file: Path, folder: Path, key: dict[str, Any], choices: list[str]) -> None:
    """Compare the report of two raters with a count by hand; the second one prefers the policy everywhere."""
    second = json.loads(file.read_text()) | {"rater": "Bob"}
    for vote in second["votes"]:
        vote["choice"] = "left" if key["pairs"][vote["pair"]]["left"] == "policy" else "right"
    other = folder / "bob.json"
    other.write_text(json.dumps(second))
    assert run("--study", study, "--votes", file, other) == 0
    results = json.loads((study / "study_results.json").read_text())
    wins = sum(
        choice != "tie" and key["pairs"][pair][choice] == "policy"
        for pair, choice in zip(key["pairs"], choices, strict=True)
    )
    assert results["by_rater"]["Ann"]["wins"] == wins
    assert results["by_rater"]["Ann"]["ties"] == choices.count("tie")
    assert results["by_rater"]["Bob"]["win_rate"] == 1.0
    assert results["votes"]["win_rate"] == pytest.approx((wins + choices.count("tie") / 2 + 8) / 16)
    assert results["by_pair"]["wins"] == wins + choices.count("tie")


def test_the_study_hides_who_is_who_and_balances_the_sides(study: Path) -> None:
    """Nothing that is handed out names a policy or a file of the comparison; half of the pairs begin on either side."""
    page = (study / "study" / "index.html").read_text().partition("<body>")[2]
    for word in ("policy", "baseline", "bright", "dim/", str(study)):
        assert word not in page
    names = [file.name for file in (study / "study" / "videos").iterdir()]
    assert len(names) == 16
    assert all(prompt not in name for prompt in PROMPTS for name in names)
    assert sorted(file.name for file in (study / "study").iterdir()) == ["index.html", "videos"]
    lefts = [pair["left"] for pair in json.loads((study / "study_key.json").read_text())["pairs"].values()]
    assert lefts.count("policy") == lefts.count("baseline") == 4
    assert lefts not in (["policy", "baseline"] * 4, ["baseline", "policy"] * 4)


def _sort_by(browser: Browser, name: str) -> None:
    browser.run(f"document.querySelector('.by').value = '{name}'")
    browser.run("document.querySelector('.by').dispatchEvent(new Event('change'))")


def _keys(browser: Browser) -> list[float]:
    return [
        float(each)
        for each in browser.run("[...document.querySelectorAll('.card')].map(card => card.dataset.key)")
    ]


def _start(browser: Browser, rater: str) -> None:
    browser.run(f"document.querySelector('#rater').value = '{rater}'")
    browser.run("document.querySelector('.start form button').click()")
    browser.wait("!document.querySelector('.vote').hidden")


def _both_play(browser: Browser) -> None:
    browser.wait(
        "[...document.querySelectorAll('video')].every(video => !video.paused && video.currentTime > 0)"
    )


def _saved(browser: Browser, rater: str) -> Path:
    """Wait for the file of votes that the browser saves."""
    browser.wait("document.querySelector('.saved').textContent !== ''")
    for _ in range(200):
        found = list(browser.downloads.glob(f"votes-*-{rater}.json"))
        if found and found[0].stat().st_size:
            return found[0]
        browser.run("new Promise(done => setTimeout(done, 50))")
    raise AssertionError(f"no file of votes in {browser.downloads}")
