"""All seven dimensions of VBench in its own form, and the quality score that its leaderboard makes of them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vpo_engine.evaluation.table import quality_line
from vpo_engine.evaluation.vbench_form import quality_scores, write_vbench_results

GOLDEN = json.loads((Path(__file__).parents[1] / "data/metrics/vbench_arith.json").read_text())[
    "normalisation"
]
ROW = GOLDEN["rows"]["ModelScope"]
DIMENSIONS = [name.replace(" ", "_") for name in GOLDEN["columns"]]


def measures(*left_out: str, unfiltered: float = 0.1) -> dict[str, Any]:
    """Return the measures of an evaluation with the leaderboard's numbers of ModelScope, by the policy."""
    found = {
        name: {"dimension": name, "policy": {"value": percent / 100}}
        for name, percent in zip(DIMENSIONS, ROW["raw_percent"], strict=True)
        if name not in left_out
    }
    if "temporal_flickering" in found:
        filtered = found.pop("temporal_flickering")
        found["temporal_flickering"] = {
            "dimension": "temporal_flickering",
            "policy": {"value": unfiltered},
        }
        found["temporal_flickering:static"] = filtered
    return found | {"pixels/motion": {"dimension": "", "policy": {"value": 3.0}}}


def test_the_quality_score_is_the_leaderboards() -> None:
    scores = quality_scores(measures(), ["policy", "baseline"])
    assert scores == {"policy": pytest.approx(ROW["quality_score"], abs=1e-9)}
    assert quality_line({"vbench_quality_score": scores}) == (
        f"VBench's quality score, of its seven dimensions: policy {ROW['quality_score']:.4f}"
    )


@pytest.mark.parametrize("name", DIMENSIONS)
def test_six_dimensions_have_no_quality_score(name: str) -> None:
    assert quality_scores(measures(name), ["policy"]) == {}
    assert quality_line({"vbench_quality_score": {}}) == ""


def test_the_archive_has_what_the_leaderboards_script_reads(tmp_path: Path) -> None:
    results = {"measures": measures(), "videos": [], "arms": {"policy": {}}}
    (archive,) = write_vbench_results(tmp_path, results)
    with zipfile.ZipFile(archive) as opened:
        (name,) = opened.namelist()
        content = json.loads(opened.read(name))
    uploaded = {key.replace("_", " "): value[0] for key, value in content.items()}
    assert uploaded == {
        column: percent / 100 for column, percent in zip(GOLDEN["columns"], ROW["raw_percent"], strict=True)
    }
