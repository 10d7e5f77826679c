"""Tables from fake cells: what is run, what is written, and what is said about the paper's claims."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cells import CLIPS, FakeCells

from vpo_engine import reproduce
from vpo_engine.reproducing import cells as cells_module
from vpo_engine.reproducing import estimating, making
from vpo_engine.reproducing.cells import Cell
from vpo_engine.reproducing.making import Asked, grid_of, make
from vpo_engine.reproducing.results import _judge_alarms
from vpo_engine.reproducing.spec import BASE, AlarmClaim
from vpo_engine.reproducing.tables import TABLES

RUNS = [name for name, table in TABLES.items() if table.kind == "runs"]
GLOBAL_REWARD, TEMPORAL = "", "reward.dimensions=[temporal_consistency]"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pictures, which take most of the time of a table."""
    monkeypatch.setattr("vpo_engine.reproducing.pictures.draw", lambda *_: [])


def asked(out: Path, *tables: str, seeds: int = 2, **changes: object) -> Asked:
    return replace(Asked(tables, out, jobs=2, seeds=seeds), **changes)


def run(given: Asked, fake: FakeCells) -> tuple[int, str]:
    said: list[str] = []
    code = make(given, said.append, fake)
    return code, "\n".join(said)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_every_run_of_every_table_has_a_valid_configuration(tmp_path: Path, quick: bool) -> None:
    grids = grid_of(Asked(RUNS, tmp_path, 1, quick=quick))
    for name, cells in grids.items():
        labels = {row.label for row in TABLES[name].rows} - {BASE}
        assert {label for label, _ in cells} == labels
        assert {seed for _, seed in cells} == ({0} if quick else {0, 1, 2})
        configs = [cell.config() for cell in cells.values()]
        assert len({config.evaluation.samples_per_prompt for config in configs}) == 1
        assert len({config.guards for config in configs}) == 1


def test_claims_and_columns_name_what_their_tables_have() -> None:
    for name in RUNS:
        table = TABLES[name]
        labels = {row.label for row in table.rows} | {BASE}
        assert len({row.label for row in table.rows}) == len(table.rows)
        papers = {key for row in table.rows for key in row.paper}
        for column in table.columns:
            assert column.paper is None or column.paper in papers or not papers
        for claim in table.claims:
            named = (*claim.more, *claim.less) if hasattr(claim, "more") else (claim.row,)
            assert labels >= set(named), claim


def test_a_table_compares_its_rows_with_the_base_policy_and_the_paper(tmp_path: Path) -> None:
    gains = {
        "": {"judge/dynamic_degree": 1.0, "judge/temporal_consistency": 0.2},
        "reward.dimensions=[dynamic_degree]": {
            "judge/dynamic_degree": 1.5,
            "judge/temporal_consistency": -0.5,
        },
        TEMPORAL: {"judge/temporal_consistency": 1.0, "reward/image": -0.3},
    }
    fake = FakeCells(gains)
    code, said = run(asked(tmp_path, "table4b"), fake)
    assert code == 0
    assert [cell.kind for cell in fake.made].count("base") == 2
    text = (tmp_path / "table4b.md").read_text()
    assert "| dynamic degree gives the most motion (57 against 38 to 44) |" in text
    verdicts = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in text.splitlines() if "**" in line
    }
    claims = [claim.said for claim in TABLES["table4b"].claims]
    assert [verdicts[claim] for claim in claims] == [
        "**agrees**",  # dynamic degree has the most motion
        "**agrees**",  # temporal consistency the most consistency
        "**agrees**",  # dynamic degree costs consistency
        "**disagrees**",  # temporal consistency lost image score
        "**agrees**",  # global moves more
        "**agrees**",  # and is less consistent
    ]
    rows = {(row["row"], row["measure"]): row for row in rows_of(tmp_path / "table4b.csv")}
    found = rows["temporal consistency", "judge/temporal_consistency"]
    assert float(found["change"]) == pytest.approx(1.025)
    assert (found["seeds"], found["clips"], found["paper"]) == ("2", str(2 * CLIPS), "97.58")
    assert rows[BASE, "judge/temporal_consistency"]["paper"] == "95.35"
    assert rows[BASE, "judge/temporal_consistency"]["change"] == ""
    for kind in ("png", "svg"):
        assert (tmp_path / f"table4b.{kind}").stat().st_size > 5000
    assert "Partial" not in text
    assert text.split("\n\n", 1)[1].strip() in said


@pytest.mark.usefixtures("undrawn")
def test_less_is_better_where_the_measure_says_so(tmp_path: Path) -> None:
    """The distance from clean clips falls by 1 for OnlineVPO and by less elsewhere: that is nearer."""
    fake = FakeCells({"": {"judge/frechet": -1.0}, "method=vader": {"judge/frechet": -0.5}})
    run(asked(tmp_path, "table5c"), fake)
    text = (tmp_path / "table5c.md").read_text()
    line = next(line for line in text.splitlines() if "nearest to real videos" in line)
    assert line.endswith("| **agrees** |")


@pytest.mark.usefixtures("undrawn")
def test_a_failing_row_is_named_and_its_table_is_marked_partial(tmp_path: Path) -> None:
    fake = FakeCells()
    fake.scripts["rollout.candidates=8"] = "import sys; sys.exit('error: out of luck')"
    code, said = run(asked(tmp_path, "table5a", seeds=1), fake)
    assert code == 1
    assert "out of luck" in said
    text = (tmp_path / "table5a.md").read_text()
    assert "**Partial: 1 of 4 runs are missing** (N = 8, seed 0)." in text
    lost = next(line for line in text.splitlines() if "eight are no better than six" in line)
    assert "not run" in lost
    assert "| N = 6 |" in text
    assert "| N = 8 |" not in text


@pytest.mark.usefixtures("undrawn")
def test_tables_share_cells_and_a_second_call_runs_nothing(tmp_path: Path) -> None:
    fake = FakeCells()
    run(asked(tmp_path, "table5a", "table4d", seeds=1), fake)
    assert [cell.settings for cell in fake.made if cell.kind == "run"].count(()) == 1
    made = len(fake.made)
    _, said = run(asked(tmp_path, "table5a", seeds=1), fake)
    assert len(fake.made) == made
    assert "all finished" in said


@pytest.mark.usefixtures("undrawn")
def test_the_first_seed_is_finished_before_the_second_begins(tmp_path: Path) -> None:
    fake = FakeCells()
    run(asked(tmp_path, "table4d", "table4c", jobs=1), fake)
    seeds = [cell.seed for cell in fake.made]
    assert seeds == sorted(seeds)


def test_a_curve_that_falls_and_an_alarm_are_judged_by_seed(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fake = FakeCells()
    fake.curve = [[3.0, 3.0], [3.6, 3.4], [3.2, 2.8]]
    fake.alarms = [{"step": 2, "kind": "divergence", "text": "it diverges"}]
    run(asked(tmp_path, "overoptimisation", seeds=1), fake)
    text = (tmp_path / "overoptimisation.md").read_text()
    said = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("** |")]
    verdicts = [line.split("|")[3].strip(" *") for line in said]
    # ReFL falls (agrees), OnlineVPO falls too (disagrees), and every guard noticed its collapse.
    assert verdicts == ["agrees", "disagrees", *["agrees"] * 4]
    assert "highest 3.60 at step 1, 3.20 at step 2" in said[0]
    assert "collapsed, divergence at step 2" in said[2]
    fake.alarms = []
    request.getfixturevalue("undrawn")
    other = tmp_path / "silent"
    run(asked(other, "overoptimisation", seeds=1), fake)
    assert (other / "overoptimisation.md").read_text().count("collapsed, no alarm | **disagrees**") == 4


def test_a_page_gets_its_tables_between_markers_that_are_checked_first(tmp_path: Path) -> None:
    page, fake = tmp_path / "page.md", FakeCells()
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold one line '<!-- table5a -->'"):
        run(asked(tmp_path / "out", "table5a", write=page), fake)
    assert not fake.made
    page.write_text("words\n<!-- table5a -->\nold\n<!-- end of table5a -->\nmore words\n")
    run(asked(tmp_path / "out", "table5a", write=page), fake)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("words\n")
    assert text.endswith("more words\n")
    assert "| N = 2 |" in text
    assert "(miniature_table5a.png)" in text
    assert (tmp_path / "miniature_table5a.png").stat().st_size > 5000


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_writes_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCells()
    run(asked(tmp_path, "table5a", seeds=1), fake)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making.Runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"5 of 10 cells are finished; the same command goes on"):
        run(asked(tmp_path, "table5a", seeds=2), fake)
    assert "**Partial: 4 of 8 runs are missing**" in (tmp_path / "table5a.md").read_text()


def test_steps_of_a_method_replace_those_of_equal_seconds_only(tmp_path: Path) -> None:
    cells = grid_of(asked(tmp_path, "table4c", steps={"refl": 77}, seeds=1))["table4c"]
    steps = {label: cell.config().steps for (label, _), cell in cells.items()}
    assert steps["ReFL, equal seconds"] == 77
    assert steps["ReFL, equal samples"] == 56
    assert steps["OnlineVPO"] == 14


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel4d"], "there is no table tabel4d; did you mean table4d?"),
        ([], "name a table: table2, table3"),
        (["table4d", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["table4d", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["table4c", "--steps", "refl=x"], "--steps refl=x must be METHOD=N"),
        (["table4c", "--steps", "dpo=3"], "--steps dpo=3 must be METHOD=N"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(words) == 1
    assert message in capsys.readouterr().err


def test_list_names_every_table_and_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--list", "--quick", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*TABLES, "together"]
    minutes = {line.split()[0]: int(line.split(" cells ")[1].split()[0]) for line in lines}
    assert all(minutes[name] <= 10 for name in TABLES)


def test_an_estimate_counts_the_evaluations_that_a_run_makes() -> None:
    """Of 14 steps the seventh is evaluated in between, on two clips of each of 16 prompts."""
    cells = (Cell("run", (f"evaluation.every={every}",), 0) for every in ("7", "null"))
    some, none = map(estimating.processor_seconds, cells)
    assert some - none == pytest.approx(2 * 16 * estimating._CLIP)


def test_an_alarm_of_the_prompt_check_says_nothing_of_a_collapse() -> None:
    curve = [{"held_out/judge/selected": value} for value in (3.0, 3.5)]
    honest: Any = SimpleNamespace(curve=curve, alarms=[{"kind": "prompt", "step": 0}])
    found = _judge_alarms(AlarmClaim("guards", "row"), {0: honest})
    assert (found.verdict, found.here) == ("agrees", "seed 0: judge 3.00 -> 3.50, honest, no alarm")


@pytest.mark.usefixtures("undrawn")
def test_a_table_is_marked_if_only_its_base_policy_was_measured_by_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tables compare with one base policy, and share no run."""
    run(asked(tmp_path, "table4d", seeds=1), FakeCells())
    assert "made by other code" not in (tmp_path / "table4d.md").read_text()
    monkeypatch.setattr(cells_module, "code_version", lambda: "another")
    fake = FakeCells()
    run(asked(tmp_path, "figure5", seeds=1, old="keep"), fake)
    assert {cell.kind for cell in fake.made} == {"run"}
    assert (
        "**Some cells were made by other code or other settings.**" in (tmp_path / "figure5.md").read_text()
    )


def test_steps_of_a_method_are_those_of_one_usual_length(tmp_path: Path) -> None:
    cells = grid_of(asked(tmp_path, "overoptimisation", steps={"refl": 20}, seeds=1))["overoptimisation"]
    configs = {label: cell.config() for (label, _), cell in cells.items()}
    assert (configs["ReFL"].steps, configs["ReFL"].optimizer.warmup_steps) == (60, 7)
    assert configs["OnlineVPO"].steps == 42


@pytest.mark.usefixtures("undrawn")
def test_a_table_says_what_each_row_took_on_average(tmp_path: Path) -> None:
    """The fake runs log two steps, of 16 prompts with four candidates, and take less than half a second."""
    run(asked(tmp_path, "table4d"), FakeCells())
    text = (tmp_path / "table4d.md").read_text()
    assert "| offline DPO | equal samples | 128 | 0 | 0, 1 | none |" in text
