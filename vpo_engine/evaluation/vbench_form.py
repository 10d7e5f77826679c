"""Write results in the form of VBench's own result files, which its leaderboard script reads.

A file holds {dimension: [score, [{"video_path": .., "video_results": ..}, ..]]}; scripts/cal_final_score.py takes it in
a zip archive (Vchitect/VBench at 45e79ec1). Only VBench's own dimensions stand there, never a stand-in.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpo_engine.full_disk import write_whole
from vpo_engine.metrics.vbench.arithmetic import RANGES, quality_score


def dimension_measures(measures: Mapping[str, Any], role: str) -> dict[str, str]:
    """Return {VBench's name of a dimension: the measure of results that stands for it} of what an arm has."""
    found: dict[str, str] = {}
    for name, entry in measures.items():
        number, dimension = entry.get(role), entry.get("dimension", "")
        if not dimension or number is None or number["value"] is None:
            continue
        if dimension in found and name == dimension:
            continue  # VBench filters videos for flickering, so the filtered number is the one that stands there
        found[dimension] = name
    return found


def quality_scores(measures: Mapping[str, Any], roles: Iterable[str]) -> dict[str, float]:
    """Return VBench's quality score of each arm that has all seven dimensions: {arm: 0..1}."""
    found = {}
    for role in roles:
        values = {
            dimension.replace("_", " "): measures[name][role]["value"]
            for dimension, name in dimension_measures(measures, role).items()
        }
        if values.keys() == RANGES.keys():
            found[role] = quality_score(values)
    return found


def vbench_results(results: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Return the scores of an arm in VBench's form; {} if none of its dimensions was measured."""
    found: dict[str, Any] = {}
    for dimension, name in dimension_measures(results["measures"], role).items():
        rows = [
            {"video_path": row[role]["file"], "video_results": row[role]["video_results"][name]}
            for row in results["videos"]
            if name in row.get(role, {}).get("video_results", {})
        ]
        found[dimension] = [results["measures"][name][role]["value"], rows]
    return found


def write_vbench_results(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write ARM_eval_results.json and ARM.zip for each arm with a dimension of VBench; return the archives."""
    archives = []
    for role in results["arms"]:
        content = vbench_results(results, role)
        if content:
            folder.mkdir(exist_ok=True)
            file = folder / f"{role}_eval_results.json"
            write_whole(file, json.dumps(content, indent=4, ensure_ascii=False))
            archives.append(folder / f"{role}.zip")
            with zipfile.ZipFile(archives[-1], "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(file, file.name)
    return archives
