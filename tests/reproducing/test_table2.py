"""Table 2: groups with a known preference, their scores, and the table of several seeds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from vpo_engine import rank
from vpo_engine.data.sprites.world import withheld_captions
from vpo_engine.reproducing import ranking, scorers
from vpo_engine.reproducing.cells import Cell, Record
from vpo_engine.reproducing.ranking import CANDIDATES, GAP, GLOBAL, JUDGE, ROWS, VARIANTS, draw_groups
from vpo_engine.reproducing.tables import TABLES

VIDEO, IMAGE = "sprites, mean of all", "sprites_image (frames)"


def test_the_preferred_clip_has_the_least_damage_by_a_margin() -> None:
    groups = draw_groups(20, seed=3)
    assert {group.caption for group in groups} == set(withheld_captions())
    for group in groups:
        assert group.videos.shape == (CANDIDATES, 17, 32, 32, 3)
        total = group.severities.sum(1)
        others = total[torch.arange(CANDIDATES) != group.preferred]
        assert (others >= total[group.preferred] + GAP).all()
    # Neither place nor kind gives it away.
    assert len({group.preferred for group in groups}) > 4
    severities = torch.stack([group.severities for group in groups])
    assert (severities > 0).float().mean() == pytest.approx(0.5, abs=0.06)


def test_the_same_seed_gives_the_same_groups_whatever_their_number() -> None:
    few, many, other = draw_groups(2, 0), draw_groups(3, 0), draw_groups(2, 1)
    for one, same, another in zip(few, many, other, strict=False):
        assert torch.equal(one.videos, same.videos)
        assert not torch.equal(one.videos, another.videos)


@pytest.mark.long
def test_scores_are_those_of_the_rank_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "ROWS", {VIDEO: ("sprites", GLOBAL), "judge": (JUDGE, GLOBAL)})
    cell = Cell("ranking", ("groups=2",), 0)
    Record.of(cell).write(tmp_path)
    assert ranking.main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / "result.json").read_text())["decoded"]
    folder = tmp_path / "groups" / "decoded"
    given = ["--preferences", str(folder / "preferences.jsonl"), "--out", str(tmp_path / "out")]
    assert rank.main([str(folder), "--reward", "sprites", *given]) == 0
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        written = [float(row[GLOBAL]) for row in csv.DictReader(file)]
    assert written == [score for row in found["scores"][VIDEO] for score in row]


def finished(folder: Path, seed: int, better: str) -> tuple[Cell, Path]:
    """Return a finished cell of four groups in which scorer ``better`` prefers the right clip, and no other does."""
    cell = Cell("ranking", ("groups=4",), seed)
    right, wrong = [2.0, *[1.0] * 7], [1.0, 2.0, *[1.5] * 6]
    result = {
        variant: {
            "preferred": [0] * 4,
            "scores": {label: [right if label == better else wrong] * 4 for label in ROWS},
        }
        for variant in VARIANTS
    }
    place = folder / f"{seed}"
    Record.of(cell).write(place)
    (place / "result.json").write_text(json.dumps(result))
    return cell, place


def test_the_table_pools_the_groups_of_all_seeds(tmp_path: Path) -> None:
    done = dict(finished(tmp_path, seed, VIDEO) for seed in range(2))
    text = scorers.markdown(TABLES["table2"], list(done), done, "the command")
    assert "8 groups, seeds 0, 1, as rendered:" in text
    assert f"| {VIDEO} | 100.0 [100.0, 100.0] |" in text
    assert f"| {IMAGE} | 12.5 [12.5, 12.5] |" in text
    assert "VideoScore: 67.23 41.38 62.74 92.66 |" in text
    assert f"| {VIDEO} - {IMAGE}: +87.5 ± 0.0 | **agrees** |" in text
    scorers.write_csv(tmp_path / "table2.csv", list(done), done)
    with (tmp_path / "table2.csv").open(newline="") as file:
        rows = {(row["variant"], row["scorer"], row["measure"]): row for row in csv.DictReader(file)}
    assert rows["decoded", VIDEO, "mrr"]["value"] == "100.0"
    assert rows["decoded", VIDEO, "recall@4"]["paper"] == "92.66"
    assert len(scorers.draw(tmp_path, "table2", list(done), done)) == 2


def test_another_result_disagrees_and_a_missing_seed_is_named(tmp_path: Path) -> None:
    done = dict([finished(tmp_path, 0, IMAGE)])
    cells = [*done, Cell("ranking", ("groups=4",), 1)]
    text = scorers.markdown(TABLES["table2"], cells, done, "the command")
    assert "**Partial: 1 of 2 seeds are missing** (seed 1)." in text
    assert text.count("**disagrees**") == len(VARIANTS)
    nothing = scorers.markdown(TABLES["table2"], cells, {}, "the command")
    assert "nothing of it has been run yet" in nothing
