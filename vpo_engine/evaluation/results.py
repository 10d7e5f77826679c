"""Make the results of an evaluation of its records: one number for each measure and arm, and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vpo_engine.evaluation.chosen_metrics import HEADINGS, Choice, measure_of, metric_key
from vpo_engine.evaluation.measuring import ArmVideos
from vpo_engine.evaluation.paired import CONFIDENCE, FEWEST, RESAMPLES, Comparison, compare_pairs, correct
from vpo_engine.evaluation.records import Records
from vpo_engine.evaluation.vbench_form import quality_scores
from vpo_engine.metrics.provenance import check_one_column
from vpo_engine.metrics.vbench.dimensions import VbenchDimension
from vpo_engine.metrics.video_metric import Record, Summary, VideoMetric, output_name
from vpo_engine.texts import counted

VERSION = 1
Key = tuple[str, int]
Covers = Callable[[str, str, int], bool]
"""Whether a metric looks at a video: its name, the prompt and the video's number."""


@dataclass(frozen=True)
class Found:
    """The findings of a metric in the videos of an arm: records that count, and {file: reason} of the others."""

    good: Mapping[Key, Record]
    failed: Mapping[str, str]


def make_results(
    sides: Sequence[ArmVideos],
    planned: Sequence[Key],
    choice: Choice,
    metrics: Mapping[str, VideoMetric],
    records: Records,
    covers: Covers,
    settings: Mapping[str, Any],
    root: Path,
) -> dict[str, Any]:
    """Return the content of ``results.json``.

    sides: the policy, and perhaps the baseline. planned: the videos that there should be. settings: what the
    evaluation was made with. root: its folder. Raise ValueError for numbers that do not belong in one column.
    """
    measures: dict[str, dict[str, Any]] = {}
    for name in sorted(choice.cards, key=lambda each: list(HEADINGS).index(choice.cards[each].group)):
        if name in metrics:
            keys = [key for key in planned if covers(name, *key)]
            measures |= _of_metric(
                metrics[name], [_found(side, keys, metrics[name], records) for side in sides]
            )
    _compare(measures, len(sides))
    problems = {side.arm.role: dict(side.problems) for side in sides}
    for side in sides:
        problems[side.arm.role] |= dict.fromkeys(_missing(side, planned), "is missing")
    partial = (
        bool(records.unloaded)
        or any(map(len, problems.values()))
        or any(each["failed"][side.arm.role] for each in measures.values() for side in sides)
        or any(_without_number(each, side.arm.role) for each in measures.values() for side in sides)
    )
    return {
        "made_by": "python -m vpo_engine.evaluate",
        "version": VERSION,
        "partial": partial,
        "settings": dict(settings),
        "arms": {side.arm.role: {"label": side.arm.label, "videos": len(side.videos)} for side in sides},
        "measures": {name: each for name, each in measures.items() if each["group"] != "proxy"},
        "proxies": {name: each for name, each in measures.items() if each["group"] == "proxy"},
        "vbench_quality_score": quality_scores(measures, [side.arm.role for side in sides]),
        "problems": problems,
        "unloaded": dict(records.unloaded),
        "statistics": _statistics_text(sum("comparison" in entry for entry in measures.values())),
        "videos": _rows(sides, planned, measures, root),
    }


def all_measures(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measures of results with the stand-ins behind them."""
    return {**results["measures"], **results["proxies"]}


def _found(side: ArmVideos, keys: Sequence[Key], metric: VideoMetric, records: Records) -> Found:
    good: dict[Key, Record] = {}
    failed: dict[str, str] = {}
    digest = metric_key(metric)
    for key in keys:
        video = side.videos.get(key)
        if video is None:
            continue  # named once, among the problems of the arm
        record = None
        if video.name not in side.problems:
            record = records.record(side.hashes[key], digest, video.prompt)
        if record is None:
            failed[video.name] = side.problems.get(video.name, "was not measured; start again")
        elif record.error:
            failed[video.name] = record.error
        else:
            good[key] = replace(record, video=video.name)  # it may be of another file with the same bytes
    return Found(good, failed)


def _of_metric(metric: VideoMetric, found: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """Return the entries of a metric's outputs. With two arms, only pairs of videos that both have are used."""
    roles = ("policy", "baseline")[: len(found)]
    common = [key for key in found[0].good if all(key in each.good for each in found)]
    summaries = [
        metric.summarise([each.good[key] for key in common]) if common else [None] * len(metric.outputs)
        for each in found
    ]
    entries = {}
    for place, output in enumerate(metric.outputs):
        name, measure = output_name(metric.card.name, output), measure_of(metric.card, output)
        numbers: dict[str, Summary | None] = {
            role: each[place] for role, each in zip(roles, summaries, strict=True)
        }
        check_one_column({role: each.provenance for role, each in numbers.items() if each is not None})
        entries[name] = {
            "metric": metric.card.name,
            "output": output,
            "group": metric.card.group,
            "dimension": metric.card.dimension,
            "label": measure.label,
            "unit": measure.unit,
            "meaning": measure.meaning,
            "better": measure.better,
            **{role: None if each is None else _number(each) for role, each in numbers.items()},
            "failed": {role: dict(each.failed) for role, each in zip(roles, found, strict=True)},
            "values": {
                role: [
                    [*key, each.good[key].values[output]]
                    for key in each.good
                    if output in each.good[key].values
                ]
                for role, each in zip(roles, found, strict=True)
            },
            "video_results": {
                role: _video_results(metric, {key: each.good[key] for key in common})
                for role, each in zip(roles, found, strict=True)
            },
        }
    return entries


def _video_results(metric: VideoMetric, records: Mapping[Key, Record]) -> list[list[Any]]:
    """Return what VBench's own result file holds of each video that counts: rows of prompt, number and value."""
    if not isinstance(metric, VbenchDimension):
        return []
    chosen = {id(record) for record in metric._chosen(list(records.values()))[0]}
    return [[*key, metric.video_result(record)] for key, record in records.items() if id(record) in chosen]


def _number(summary: Summary) -> dict[str, Any]:
    fields = summary.to_fields()
    return {key: fields[key] for key in ("value", "notes", "partial", "others", "provenance")}


def _without_number(entry: Mapping[str, Any], role: str) -> bool:
    """Return whether videos were measured, and made no number: too few of them, for example."""
    number = entry[role]
    return number is not None and number["value"] is None


def _compare(measures: Mapping[str, dict[str, Any]], arms: int) -> None:
    """Add the comparison of each measure that has values of single videos."""
    found: dict[str, Comparison] = {}
    for name, entry in measures.items():
        if arms < 2:
            continue
        pairs = _pairs(entry["values"])
        if pairs:
            found[name] = compare_pairs(pairs, entry["better"])
    for name, comparison in correct(found).items():
        measures[name]["comparison"] = comparison.to_json()


def _pairs(values: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, list[tuple[float, float]]]:
    before = {(prompt, index): value for prompt, index, value in values["baseline"]}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for prompt, index, value in values["policy"]:
        if (prompt, index) in before:
            pairs.setdefault(prompt, []).append((before[prompt, index], value))
    return pairs


def _missing(side: ArmVideos, planned: Sequence[Key]) -> list[str]:
    return [f"{prompt}-{index}.mp4" for prompt, index in planned if (prompt, index) not in side.videos]


def _place(path: Path, root: Path) -> str:
    """Return where a video is: relative to the evaluation's folder if it lies below it."""
    full, above = path.resolve(), root.resolve()
    return full.relative_to(above).as_posix() if full.is_relative_to(above) else str(full)


def _rows(
    sides: Sequence[ArmVideos], planned: Sequence[Key], measures: Mapping[str, dict[str, Any]], root: Path
) -> list[dict[str, Any]]:
    """Return a row for each prompt and number, with the files of the arms and their values."""
    by_arm: dict[str, dict[Key, dict[str, float]]] = {side.arm.role: {} for side in sides}
    published: dict[str, dict[Key, dict[str, float]]] = {side.arm.role: {} for side in sides}
    for name, entry in measures.items():
        for role, values in entry.pop("values").items():
            for prompt, index, value in values:
                by_arm[role].setdefault((prompt, index), {})[name] = value
        for role, values in entry.pop("video_results").items():
            for prompt, index, value in values:
                published[role].setdefault((prompt, index), {})[name] = value
    rows = []
    for prompt, index in planned:
        row: dict[str, Any] = {"prompt": prompt, "index": index}
        for side in sides:
            video = side.videos.get((prompt, index))
            if video is not None:
                row[side.arm.role] = {
                    "file": _place(video.path, root),
                    "sha256": side.hashes[prompt, index],
                    "values": by_arm[side.arm.role].get((prompt, index), {}),
                }
                if video.name in side.problems:
                    row[side.arm.role]["problem"] = side.problems[video.name]
                if (prompt, index) in published[side.arm.role]:
                    row[side.arm.role]["video_results"] = published[side.arm.role][prompt, index]
        rows.append(row)
    return rows


def _statistics_text(count: int) -> str:
    """Say how the bounds and p values were made, and what to make of several of them; "" where there are none."""
    if not count:
        return ""
    are = "is" if count == 1 else "are"
    return (
        f"Bounds are {100 * CONFIDENCE:.0f} % bounds of a percentile bootstrap over prompts ({RESAMPLES} resamples), "
        f"widened for few prompts; of fewer than {FEWEST} they are Student's t. The win rate counts ties as half. "
        "p: exact sign test over prompts, two-sided. "
        f"There {are} {counted(count, 'measure')}, of which one in twenty would look clear by chance, so p is "
        "corrected for their number by Holm's method, and the bounds are not."
    )
