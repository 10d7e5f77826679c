"""Rankings and scores as they are printed and written: each number in its own place."""

from __future__ import annotations

import csv
from pathlib import Path

from vpo_engine.metrics.ranking import rank_preferences
from vpo_engine.metrics.ranking_report import format_ranking, format_scores, write_ranking_csv

SCORES = [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [1.0, 3.0, 2.0]]
RANKING = rank_preferences(SCORES, [0, 0, 0, 0], recalls=(1, 2))
"""Ranks 1, 3, 2 and 3."""


def test_each_number_of_a_ranking_has_its_column(tmp_path: Path) -> None:
    write_ranking_csv(tmp_path / "r.csv", {"one": RANKING})
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    (line,) = [each for each in format_ranking({"one": RANKING}).splitlines() if each.startswith("one")]
    for name, found in RANKING.measures.items():
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        numbers = {"value": found.value, "low": found.low, "high": found.high, "chance": RANKING.chance[name]}
        assert {column: float(rows[name][column]) for column in numbers} == numbers
        assert f"{100 * found.value:.2f} [{100 * found.low:.1f}, {100 * found.high:.1f}]" in line


def test_the_last_line_of_scores_is_the_mean_over_videos() -> None:
    rows = {"a.mp4": (1.0, 4.0), "b.mp4": (2.0, 8.0), "c.mp4": (6.0, 3.0)}
    scores = {(name, "p"): {"x": x, "y": y} for name, (x, y) in rows.items()}
    assert format_scores(scores).splitlines()[-1].split() == ["mean", "of", "3", "videos", "3.0000", "5.0000"]
