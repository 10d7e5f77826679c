"""Studies and the files of votes on them: what is written, counted and refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation_case import PROMPTS, run, videos

from vpo_engine.evaluation.paired import wilson


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of two folders of four prompts with two videos each."""
    root = tmp_path_factory.mktemp("comparison")
    bright, dim = videos(root / "bright", 160), videos(root / "dim", 120)
    assert run(bright, "--baseline", dim, "--metrics", "pixels", "--out", root / "out") == 0
    return root / "out"


@pytest.fixture
def folder(comparison: Path, tmp_path: Path) -> Path:
    """A copy of the evaluation, without a study."""
    return Path(shutil.copytree(comparison, tmp_path / "evaluation"))


def ballot(folder: Path, name: str, choices: list[str], **changed: Any) -> Path:
    """Write a file of votes as the page saves it; ``choices`` are "policy", "baseline" or "tie", in the key's order."""
    key = json.loads((folder / "study_key.json").read_text())
    votes = []
    for (pair, sides), choice in zip(key["pairs"].items(), choices, strict=False):
        side = (
            choice if choice == "tie" else next(side for side in ("left", "right") if sides[side] == choice)
        )
        votes.append({"pair": pair, "choice": side, "seconds": 1.5})
    content = {"study": key["study"], "rater": name, "complete": True, "votes": votes} | changed
    file = folder.parent / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


def test_votes_become_win_rates_with_wilsons_intervals(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--study", folder) == 0
    ann = ballot(folder, "Ann", ["policy", "policy", "tie", "baseline"])
    bob = ballot(folder, "Bob", ["policy", "baseline", "baseline", "baseline"])
    assert run("--study", folder, "--votes", ann, bob) == 0
    results = json.loads((folder / "study_results.json").read_text())
    assert results["votes"] == {
        "wins": 3,
        "ties": 1,
        "losses": 4,
        "win_rate": 3.5 / 8,
        "low": wilson(3.5, 8)[0],
        "high": wilson(3.5, 8)[1],
    }
    assert (results["by_pair"]["wins"], results["by_pair"]["ties"], results["by_pair"]["losses"]) == (1, 1, 2)
    assert results["by_rater"]["Ann"]["win_rate"] == 2.5 / 4
    # Values of each pair: pp, pb, tb, bb; three categories, eight values.
    observed, expected = 2 + 2, 3 * 5 + 4 * 4 + 1 * 7
    assert results["agreement"]["krippendorff_alpha"] == pytest.approx(1 - 7 * observed / expected)
    assert (folder / "study_results.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "43.8 %" in said
    assert "Krippendorff's alpha is" in said


def test_one_rater_has_no_agreement_and_may_leave_pairs_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--study", folder) == 0
    assert run("--study", folder, "--votes", ballot(folder, "Ann", ["policy", "tie"])) == 0
    results = json.loads((folder / "study_results.json").read_text())
    assert results["votes"]["win_rate"] == 0.75
    assert results["agreement"]["krippendorff_alpha"] is None
    assert "no agreement between raters" in capsys.readouterr().out


def test_sides_are_balanced_and_a_seed_repeats_them(comparison: Path, tmp_path: Path) -> None:
    keys = []
    for number, (seed, pairs) in enumerate([(3, 7), (3, 7), (4, 7), (5, 8), (6, 8), (7, 8)]):
        folder = Path(shutil.copytree(comparison, tmp_path / str(number)))
        assert run("--study", folder, "--seed", str(seed), "--pairs", str(pairs)) == 0
        key = json.loads((folder / "study_key.json").read_text())
        assert key["seed"] == seed
        lefts = [pair["left"] for pair in key["pairs"].values()]
        assert abs(lefts.count("policy") - lefts.count("baseline")) == pairs % 2
        assert all({pair["left"], pair["right"]} == {"policy", "baseline"} for pair in key["pairs"].values())
        shown = [(pair["prompt"], pair["index"]) for pair in key["pairs"].values()]
        assert len(set(shown)) == pairs
        assert len({prompt for prompt, _ in shown}) == 4
        keys.append((lefts, shown))
    assert keys[0] == keys[1]
    for one, other in ((keys[0], keys[2]), (keys[3], keys[4]), (keys[4], keys[5])):
        assert one[0] != other[0], "the seed decides the sides"
        assert one[1] != other[1], "and the order"


def test_the_videos_of_a_pair_are_those_of_the_key(folder: Path) -> None:
    """The file on the left has the bytes of the policy's video where the key says so."""
    from html import unescape

    assert run("--study", folder) == 0
    page = (folder / "study" / "index.html").read_text()
    data = json.loads(unescape(page.partition('data-study="')[2].partition('"')[0]))
    key = json.loads((folder / "study_key.json").read_text())
    rows = {
        (row["prompt"], row["index"]): row
        for row in json.loads((folder / "results.json").read_text())["videos"]
    }
    assert data["study"] == key["study"]
    for pair in data["pairs"]:
        entry = key["pairs"][pair["id"]]
        row = rows[entry["prompt"], entry["index"]]
        assert pair["prompt"] == entry["prompt"]
        for side in ("left", "right"):
            source = folder / row[entry[side]]["file"]
            assert (folder / "study" / pair[side]).read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"study": "another"}, "holds votes on the study 'another'"),
        ({"rater": " "}, "has no rater's name"),
        ({"votes": []}, "holds no vote"),
        ({"votes": [{"pair": "pair-009", "choice": "left"}]}, "vote 1 is 'left' on 'pair-009'"),
        ({"votes": [{"pair": "pair-000", "choice": "both"}]}, "vote 1 is 'both' on 'pair-000'"),
        ({"votes": [{"pair": "pair-000", "choice": "left"}] * 2}, "has two votes on pair-000"),
        ({"votes": ["left"]}, "vote 1 is None on None"),
    ],
)
def test_votes_that_are_not_valid_are_refused_by_file(
    folder: Path, changed: dict[str, Any], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--study", folder) == 0
    file = ballot(folder, "Ann", ["policy"], **changed)
    assert run("--study", folder, "--votes", file) == 1
    said = capsys.readouterr().err
    assert part in said
    assert str(file) in said
    assert not (folder / "study_results.json").exists()


def test_no_one_votes_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--study", folder) == 0
    file = ballot(folder, "Ann", ["policy"])
    copy = file.with_name("copy.json")
    copy.write_text(file.read_text())
    assert run("--study", folder, "--votes", file, copy) == 1
    assert "are both by 'Ann'" in capsys.readouterr().err
    file.write_text("[1")
    assert run("--study", folder, "--votes", file) == 1
    assert "is no file of votes" in capsys.readouterr().err


def test_studies_that_cannot_be_made_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--study", folder / "nowhere") == 1
    assert "holds no results.json" in capsys.readouterr().err
    assert run("--study", folder, "--votes", folder / "votes.json") == 1
    assert "no study was written there" in capsys.readouterr().err
    assert run("--study", folder, "--pairs", "9") == 1
    assert "the comparison has 8 pairs" in capsys.readouterr().err
    assert run("--study", folder) == 0
    assert run("--study", folder) == 1
    assert "has a study already" in capsys.readouterr().err
    results = json.loads((folder / "results.json").read_text())
    del results["arms"]["baseline"]
    (folder / "results.json").write_text(json.dumps(results))
    assert run("--study", folder) == 1
    assert "evaluate with --baseline OTHER first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--study", "FOLDER", "--metrics", "fvd"), "as they are; leave --metrics out"),
        (("--study", "FOLDER", "--baseline"), "as they are; leave --baseline out"),
        (
            ("--study", "FOLDER", "--votes", "votes.json", "--pairs", "3"),
            "as it was written; leave --pairs out",
        ),
        (("--study", "FOLDER", "rollout.steps=3"), "neither WHAT nor settings"),
        (("FOLDER", "--pairs", "3"), "only a study has pairs (--study FOLDER); leave --pairs out"),
    ],
)
def test_an_option_that_would_not_be_followed_is_refused(
    folder: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*(str(folder) if word == "FOLDER" else word for word in words))
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (folder / "study").exists()


def test_the_share_of_left_videos_is_counted_without_ties(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--study", folder) == 0
    pairs = json.loads((folder / "study_key.json").read_text())["pairs"]
    sides = ("left", "left", "right", "tie")
    votes = [{"pair": pair, "choice": side} for pair, side in zip(pairs, sides, strict=True)]
    assert run("--study", folder, "--votes", ballot(folder, "Ann", [], votes=votes)) == 0
    left = json.loads((folder / "study_results.json").read_text())["left_chosen"]
    assert left == {"share": 2 / 3, "bounds": list(wilson(2, 3)), "votes": 3}
    assert "The left video was chosen in 67 % of the votes" in capsys.readouterr().out


def test_nobody_votes_on_a_pair_whose_video_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bright = videos(tmp_path / "bright", 160, PROMPTS[:3], count=1)
    dim = videos(tmp_path / "dim", 120, PROMPTS[:3], count=1)
    (dim / f"{PROMPTS[1]}-0.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    assert run(bright, "--baseline", dim, "--metrics", "pixels", "--out", out) == 1
    assert run("--study", out, "--pairs", "3") == 1
    assert "the comparison has 2 pairs" in capsys.readouterr().err
    assert run("--study", out) == 0
    pairs = json.loads((out / "study_key.json").read_text())["pairs"].values()
    assert {pair["prompt"] for pair in pairs} == {PROMPTS[0], PROMPTS[2]}


def test_the_command_that_reads_votes_works_in_any_folder(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(comparison, tmp_path / "my evaluation"))
    assert run("--study", folder) == 0
    words = shlex.split(capsys.readouterr().out.partition("python -m ")[2])
    assert words == ["vpo_engine.evaluate", "--study", str(folder), "--votes", "FILE", "..."]
