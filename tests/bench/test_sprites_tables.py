"""Test the paper's tables on the sprites world: groups with a known preference, kept runs, and formatted pages."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import MappingProxyType

import pytest
import sprites_ranking
import sprites_runs
import sprites_tables
import torch
from sprites_ranking import CANDIDATES, GAP, GLOBAL, draw_groups, make_rankings
from sprites_runs import RUNS, TABLES, Row, command, measured, train
from sprites_tables import directions, main, runs_table

from vpo_engine import rank
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.world import withheld_captions
from vpo_engine.metrics.ranking import rank_preferences

SMALL = (
    "pairs_per_step=2",
    "rollout.candidates=2",
    "rollout.steps=2",
    "evaluation.prompts=2",
    "evaluation.samples_per_prompt=2",
    "evaluation.samples_between=1",
)


class TestGroups:
    def test_the_preferred_clip_has_the_least_damage_by_a_margin(self) -> None:
        groups = draw_groups(20, seed=3)
        assert {group.caption for group in groups} == set(withheld_captions())
        for group in groups:
            assert group.videos.shape == (CANDIDATES, 17, 32, 32, 3)
            total = group.severities.sum(1)
            others = total[torch.arange(CANDIDATES) != group.preferred]
            assert (others >= total[group.preferred] + GAP).all()
        # Neither place nor kind gives it away.
        assert len({group.preferred for group in groups}) > 4
        assert (torch.stack([group.severities for group in groups]) > 0).float().mean() == pytest.approx(
            0.5, abs=0.06
        )

    def test_the_same_seed_gives_the_same_groups_whatever_their_number(self) -> None:
        few, many, other = draw_groups(2, 0), draw_groups(3, 0), draw_groups(2, 1)
        for one, same, another in zip(few, many, other, strict=False):
            assert torch.equal(one.videos, same.videos)
            assert not torch.equal(one.videos, another.videos)

    @pytest.mark.long
    def test_rankings_are_those_of_the_rank_command_and_are_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sprites_ranking, "REWARDS", ("sprites",))
        monkeypatch.setattr(
            sprites_ranking, "ROWS", {"video": ("sprites", GLOBAL), "judge": (sprites_ranking.JUDGE, GLOBAL)}
        )
        made, settings = make_rankings(tmp_path, 2, 0, "here")
        assert settings == {"groups": 2, "seed": 0, "origin": "here"}
        monkeypatch.setattr(sprites_ranking, "rank_groups", None)
        assert make_rankings(tmp_path, 2, 0, "elsewhere") == (made, settings)
        folder = tmp_path / "ranking_2_0" / "decoded"
        preferences = folder / "preferences.jsonl"
        given = ["--preferences", str(preferences), "--out", str(tmp_path / "out")]
        assert rank.main([str(folder), "--reward", "sprites", *given]) == 0
        with (tmp_path / "out" / "ranking.csv").open(newline="") as file:
            written = {row["measure"]: row for row in csv.DictReader(file) if row["score"] == GLOBAL}
        for name, found in made["decoded"]["video"].measures.items():
            assert float(written[name]["value"]) == found.value
            assert float(written[name]["high"]) == found.high


class TestRuns:
    def test_runs_differ_in_their_reward_alone_and_cover_the_tables(self) -> None:
        assert {row.run for rows in TABLES.values() for row in rows} == set(RUNS)
        whole = [load_config(None, command(name, Path("x"), 0, None)[2:]).model_dump() for name in RUNS]
        for config in whole:
            for key in ("name", "run_dir", "reward"):
                del config[key]
        assert all(config == whole[0] for config in whole)

    @pytest.mark.long
    def test_a_run_is_made_once_and_measured_on_its_own_clips(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(RUNS, "image", (*RUNS["image"], *SMALL))
        train(["image"], tmp_path, seed=0, steps=1, jobs=2)
        stored = json.loads((tmp_path / "image" / "summary.json").read_text())
        monkeypatch.setattr(sprites_runs, "_train_one", None)
        train(["image"], tmp_path, seed=0, steps=1, jobs=2)
        found = measured(["image"], tmp_path, "here")["image"]
        assert found["clips"] == 4
        assert found["origin"] == "here"
        # Trained by the image score, so the run's own summary has it: another reading of the same clips.
        for when in ("before", "after"):
            own = stored["measures"]["reward/image"][when]
            assert found["measures"]["reward/image"][when] == pytest.approx(own, abs=1e-3)
        monkeypatch.setattr(sprites_runs, "look", None)
        assert measured(["image"], tmp_path, "elsewhere")["image"] == found

    def test_clips_other_than_the_runs_are_refused(self) -> None:
        ours = {"measures": {"judge/visual_quality": {"before": 3.0, "after": 3.1}}}
        theirs = {"measures": {"judge/visual_quality": {"before": 3.0, "after": 3.5}}}
        with pytest.raises(ValueError, match=r"visual_quality after training is 3.1000, .* says 3.5000"):
            sprites_runs._check_same_clips(theirs, ours, Path("x"))

    def test_a_failing_run_is_named_with_its_last_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = "import sys; print('before'); sys.exit('error: out of luck')"
        monkeypatch.setattr(sprites_runs, "command", lambda *_: ["-c", words])
        with pytest.raises(
            ValueError, match=r"training failed for global; .*global.log ends with: error: out of luck"
        ):
            train(["global"], tmp_path, seed=0, steps=1, jobs=1)


def summary(dynamic: float, consistent: float, image: float) -> dict:
    def numbers(after: float) -> dict[str, float]:
        return {
            "before": 2.0,
            "after": after,
            "difference": after - 2,
            "low": after - 2.1,
            "high": after - 1.9,
        }

    measures = {key: numbers(2.0) for key in sprites_tables.COLUMNS.values()}
    measures["judge/dynamic_degree"] = numbers(dynamic)
    measures["judge/temporal_consistency"] = numbers(consistent)
    measures["reward/image"] = numbers(image)
    return {"clips": 4, "origin": "here", "measures": measures}


class TestTables:
    rows = (
        Row("one", "a", (40.0, 97.0, 50.0)),
        Row("two", "b", (50.0, 95.0, 55.0)),
        Row("three", "c", None),
    )
    found = MappingProxyType(
        {"a": summary(2.5, 3.0, 1.0), "b": summary(3.0, 2.05, 0.5), "c": summary(4.0, 4.0, 4.0)}
    )

    def test_changes_beyond_doubt_are_marked(self) -> None:
        table = runs_table(self.rows, self.found)
        place = table.header.index("temporal consistency")
        assert [line[place] for line in table.lines] == ["2.000", "3.000 ↑", "2.050", "4.000 ↑"]
        place = table.header.index("image score")
        assert [line[place] for line in table.lines] == ["2.000", "1.000 ↓", "0.500 ↓", "4.000 ↑"]
        assert [line[-1] for line in table.lines[1:]] == ["40 97 50", "50 95 55", ""]

    def test_the_paper_is_compared_over_its_own_rows(self) -> None:
        said = directions(self.rows, self.found)
        assert [line.rpartition(": ")[2] for line in said] == [
            "as in the paper.",
            "as in the paper.",
            "not as in the paper.",
        ]
        assert said[0].startswith("- dynamic degree is highest with *two* and lowest with *one*; the paper's")

    @pytest.mark.long
    def test_the_page_gets_its_tables_and_pictures(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ranking = rank_preferences([[1.0, 2.0], [2.0, 1.0]], [1, 1])
        labels = dict.fromkeys(sprites_ranking.ROWS, ranking)
        made = ({"rendered": labels, "decoded": labels}, {"groups": 2, "seed": 0, "origin": "here"})
        monkeypatch.setattr(sprites_ranking, "make_rankings", lambda *_: made)
        monkeypatch.setattr(sprites_runs, "train", lambda *_: None)
        every = {name: summary(2.5, 3.0, 2.2) for name in RUNS}
        monkeypatch.setattr(sprites_runs, "measured", lambda *_: every)
        page = tmp_path / "page.md"
        page.write_text(
            "".join(f"<!-- table {n} -->\nold\n<!-- end of table {n} -->\nwords\n" for n in ("2", "4a", "4b"))
        )
        given = ["--out", str(tmp_path / "out"), "--write", str(page)]
        assert main(given) == 0
        text = page.read_text()
        assert "old" not in text
        assert text.count("words") == 3
        assert "| sprites, mean of all | 75.0 [50.0, 100.0] |" in text
        assert text.count("| base policy | 2.000 |") == 2
        for name in ("2", "4b"):
            assert (tmp_path / f"sprites_table{name}.png").stat().st_size > 5000
        assert capsys.readouterr().out.count("Table ") == 3
        page.write_text("no markers")
        assert main(given) == 1
        assert "must hold one line '<!-- table 2 -->'" in capsys.readouterr().err
