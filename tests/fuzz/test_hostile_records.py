"""Files that the engine wrote and reads back, changed by strangers: results, votes, logs, cells, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from fuzz_driver import clear_errors, flip, fuzz
from hypothesis import strategies as st
from safetensors.torch import save_file

from vpo_engine import evaluate
from vpo_engine.evaluation.records import FACTS, METRIC, Records
from vpo_engine.exporting.adapter import read_adapter
from vpo_engine.reproducing.cells import Record
from vpo_engine.runs import report
from vpo_engine.runs.directory import RunDirectory

ODD = st.sampled_from(
    ["", "policy", "baseline", "left", "tie", "../../etc/passwd", "/dev/zero", "\x1b[2J", "a\nb", "</script>", "\ud800",
     "train", "eval", "é", -1, 0, 1, 1.5, 10**400, 1e308, -1e308, 1e-320, float("nan"), float("inf"),
     True, None, [], {}]
)  # fmt: skip
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 20), max_size=6), VALUES, st.booleans()), min_size=1, max_size=3
)
"""Where to go from the outermost value (the numbers of entries), the new value, and whether the entry is removed."""
PLACES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3)


def changed(content: Any, changes: list[tuple[list[int], Any, bool]]) -> Any:
    """Return JSON values with some exchanged or removed."""
    content = json.loads(json.dumps(content))
    for path, value, removed in changes:
        place, parent, key = content, None, None
        for number in path:
            keys = (
                list(place)
                if isinstance(place, dict)
                else list(range(len(place)))
                if isinstance(place, list)
                else []
            )
            if not keys:
                break
            parent, key = place, keys[number % len(keys)]
            place = parent[key]
        if parent is None:
            content = value
        elif removed:
            del parent[key]
        else:
            parent[key] = value
    return content


STUDY = {
    "study": "0123456789ab",
    "seed": 0,
    "arms": {"policy": "new", "baseline": "old"},
    "pairs": {
        f"pair-{number:03d}": {"prompt": "a fox", "index": number, "left": "policy", "right": "baseline"}
        for number in range(3)
    },
}
VOTES = {
    "study": "0123456789ab",
    "rater": "Ann",
    "complete": True,
    "votes": [{"pair": f"pair-{number:03d}", "choice": "left", "seconds": 1.0} for number in range(3)],
}
RESULTS = {
    "measures": {},
    "settings": {"height": 32, "width": 32},
    "arms": {"policy": {"label": "new", "videos": 1}, "baseline": {"label": "old", "videos": 1}},
    "videos": [{"prompt": "a fox", "index": 0, "policy": {"file": "p.mp4"}, "baseline": {"file": "b.mp4"}}],
}


@pytest.fixture(scope="module", autouse=True)
def matplotlib_is_ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Draw once before files are guarded: matplotlib keeps a list of fonts in the user's folder."""
    from vpo_engine.evaluation.votes import draw_votes

    share = {"wins": 1, "ties": 0, "losses": 0, "win_rate": 1.0, "low": 0.2, "high": 1.0}
    draw_votes(tmp_path_factory.mktemp("drawn") / "a.png", {"votes": share, "by_pair": share})


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


@fuzz(votes=CHANGES, key=st.just([]) | CHANGES)
def test_votes_and_the_key_of_a_study(folder: Path, votes: Any, key: Any) -> None:
    write(folder / "study_key.json", changed(STUDY, key))
    write(folder / "votes.json", changed(VOTES, votes))
    call(evaluate.main, ["--study", str(folder), "--votes", str(folder / "votes.json")])


@fuzz(changes=CHANGES)
def test_the_results_that_a_study_is_made_of(folder: Path, changes: Any) -> None:
    for name in ("p.mp4", "b.mp4"):
        (folder / name).write_bytes(b"video")
    write(folder / "results.json", changed(RESULTS, changes))
    call(evaluate.main, ["--study", str(folder)])
    handed_out = {path.read_bytes() for path in folder.glob("study/videos/*")}
    assert handed_out <= {b"video"}, "only videos are handed out"


MEASURE = {"before": 1.0, "after": 2.0, "difference": 1.0, "low": 0.5, "high": 1.5, "relative": 1.0}
SUMMARY = {
    "clips": 4,
    "confidence": 0.95,
    "measures": dict.fromkeys(("reward/selected", "judge/selected", "pixels/jitter"), MEASURE),
    "timings": {"rollout": 3.0, "update": 1.0},
}
ROWS = [
    {"step": 0, "kind": "eval", "held_out/reward/selected": 1.0, "guards/prompt/visual_quality": 0.5},
    {"step": 1, "kind": "train", "loss": 0.7, "margin": 0.0, "seconds/step": 1.0, "seconds/rollout": 0.9},
    {"step": 2, "kind": "train", "loss": 0.6, "margin": 0.1, "seconds/step": 1.0, "reference_age": 0},
    {"step": 2, "kind": "eval", "held_out/reward/selected": 1.5},
]
ALARMS = [{"step": 2, "kind": "style", "text": "the clips look different"}]
NOTHING = st.just([])


@fuzz(summary=NOTHING | CHANGES, rows=NOTHING | CHANGES, alarms=NOTHING | CHANGES, config=NOTHING | CHANGES)
def test_the_files_of_a_run(folder: Path, summary: Any, rows: Any, alarms: Any, config: Any) -> None:
    settings = changed({"name": "a", "steps": 2, "reward": {"dimensions": ["visual_quality"]}}, config)
    run = RunDirectory(folder)
    write(run.config, settings)
    write(run.summary, changed(SUMMARY, summary))
    for path, lines in ((run.metrics, changed(ROWS, rows)), (run.alarms, changed(ALARMS, alarms))):
        lines = lines if isinstance(lines, list) else [lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), errors="surrogatepass")
    call(lambda words: report.main(words), [str(folder)])  # type: ignore[func-returns-value]


@fuzz(name=st.sampled_from(["summary", "metrics", "alarms", "config"]), places=PLACES, cut=st.integers(0, 50))
def test_damaged_files_of_a_run(folder: Path, name: str, places: Any, cut: int) -> None:
    run = RunDirectory(folder)
    write(run.config, {"name": "a", "steps": 2})
    write(run.summary, SUMMARY)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in ROWS))
    run.alarms.write_text("".join(json.dumps(line) + "\n" for line in ALARMS))
    path: Path = getattr(run, name)
    content = flip(path.read_bytes(), places)
    path.write_bytes(content[: max(0, len(content) - cut)])
    call(lambda words: report.main(words), [str(folder)])  # type: ignore[func-returns-value]


CELL = {
    "kind": "run", "source": "sprites.yaml", "settings": ["steps=3"], "seed": 0, "resolved": "steps: 3\n", "code": "0",
    "commit": "0", "machine": "m", "finished": True, "seconds": {"train": [1.0, 2.0]}, "attempts": 1, "made": "now",
}  # fmt: skip


@fuzz(changes=CHANGES)
def test_the_record_of_a_cell(folder: Path, changes: Any) -> None:
    write(folder / "cell.json", changed(CELL, changes))
    with clear_errors(naming="cell.json"):
        record = Record.read(folder)
        assert record is not None
        sum(processor for processor, _ in record.seconds.values())


@fuzz(changes=CHANGES, cut=st.integers(0, 30))
def test_the_records_of_an_evaluation(folder: Path, changes: Any, cut: int) -> None:
    rows = [
        {"kind": FACTS, "sha256": "0", "frames": 3, "height": 4, "width": 4, "fps": 8.0, "error": ""},
        {"kind": METRIC, "sha256": "0", "metric": "m", "record": {
            "video": "a.mp4", "prompt": "a", "frames": 3, "height": 4, "width": 4, "fps": 8.0, "values": {"": 1.0},
            "details": {}, "error": "",
        }},
    ]  # fmt: skip
    lines = changed(rows, changes)
    text = "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines]))
    (folder / "process_0.jsonl").write_text(
        text[: len(text) - cut] if cut < 20 else text, errors="surrogatepass"
    )
    records = Records(folder, 0)
    with clear_errors(naming="process_0.jsonl"):
        records.read([FACTS, METRIC])
        facts = records.facts("0")
        assert facts is None or facts.describe()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


@fuzz(
    changes=CHANGES,
    pattern=st.sampled_from(
        ["0", "(a+)+$", "(.*)*", "[", "(?P<", "a{9999999}", ".*.*.*.*.*x", "\\", "(?:a|a)*b", ""]
    ),
    alpha=VALUES,
)
def test_the_configuration_of_an_adapter(
    folder: Path, network: torch.nn.Module, changes: Any, pattern: str, alpha: Any
) -> None:
    tensors = {f"base_model.model.0.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"r": 4, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {pattern: alpha}}
    write(folder / "adapter_config.json", changed(fields, changes))
    with clear_errors():
        read_adapter(folder / "adapter_model.safetensors", network, {}.get, "the tiny model")
