"""Faults that fuzz tests and people have found in files and words of strangers, each at the command line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_line import call
from safetensors.torch import save_file

from vpo_engine import check_model, evaluate, export, plan, rank, reproduce, sample, train
from vpo_engine.exporting.adapter import read_adapter
from vpo_engine.runs import report
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.lock import RunLock

Make = Callable[[Path], object]
MOST_SECONDS = 2.0


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = ModuleType("vpo_engine.training")
    module.run_training = lambda config: 0
    monkeypatch.setitem(sys.modules, "vpo_engine.training", module)
    monkeypatch.chdir(tmp_path)


def text(content: str) -> Make:
    return lambda path: path.write_text(content)


def holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 << 30)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "x0: &x0 {a: 1}\n" + "".join(f"x{n}: &x{n} {{<<: [*x{n - 1}, *x{n - 1}]}}\n" for n in range(1, 30))
LONG = "x" * 400
WRONG_CONFIGURATIONS: dict[str, tuple[Make, str]] = {
    "aliases that multiply": (text(BOMB), "aliases (*name) repeat values until there are more than 20,000"),
    "merges that multiply": (text(MERGES), "aliases (*name) repeat values"),
    "a group that is its own part": (text("model: &m {<<: *m}\n"), "model contains itself"),
    "a number as a merge": (text("<<: 5\n"), ":1: this is not valid YAML: expected a mapping"),
    "deep lists": (text("steps: " + "[" * 9000), "lists and groups lie too deep inside one another"),
    "deep blocks": (
        text("steps:\n " + "- " * 9000 + "1\n"),
        "lists and groups lie too deep inside one another",
    ),
    "a pipe": (os.mkfifo, "is a pipe; write the content to a file first"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device; write the content to a file first"),
    "a link to itself": (
        lambda path: path.symlink_to(path),
        "cannot be read (Too many levels of symbolic links)",
    ),
    "a large file": (holes, "has more than 131,072 bytes, so it is no configuration file"),
    "a name that is a line break": (
        text('checkpoint:\n  background: {"\\n": ""}\n'),
        "must be true or false",
    ),
    "half a character": (text('name: "\\ud800"\n'), "must be text, without halves of surrogate pairs"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGURATIONS)
def test_wrong_configuration_files(tmp_path: Path, name: str) -> None:
    make, message = WRONG_CONFIGURATIONS[name]
    make(tmp_path / "c.yaml")
    began = time.process_time()
    ended = call(train.main, [str(tmp_path / "c.yaml")])
    assert ended.code == 1
    assert message in ended.err
    assert time.process_time() - began < MOST_SECONDS


WRONG_WORDS = {
    f"seed={'9' * 30}": "does not fit in 64 bits",
    f"steps={'9' * 5000}": "must be a whole number",
    "objective.beta=.nan": "objective.beta=.nan must be a finite number",
    f"evaluation.prompts={LONG}": "must be a whole number",
    f"prompts.train=/tmp/{LONG}": "there is no such file",
    "checkpoint.from=/nowhere": "checkpoint.from=/nowhere is no checkpoint of a run; give its step, or a folder",
    "name=\udcff": "is not UTF-8",
    "steps=\x1b[2J": r"steps=\x1b[2J must be a whole number",
    f"{LONG}.yaml": "there is no configuration file xxx",
    "distributed.sequence_parallel=3": "does not divide the one process that trains; start a multiple of 3",
    "offline_dpo.file=pairs.txt method=offline_dpo": "pairs.txt: unknown kind of preference file '.txt'",
    "prompts.held_out=pipe.txt": "pipe.txt is a pipe",
    "distributed.engine=deepspeed distributed.deepspeed_config=deep.json": "(lists and objects lie too deep",
}


@pytest.mark.parametrize(
    "words", WRONG_WORDS, ids=lambda words: words[:30].encode("ascii", "replace").decode()
)
def test_wrong_words(tmp_path: Path, words: str) -> None:
    (tmp_path / "pairs.txt").write_text("a\n")
    (tmp_path / "deep.json").write_text("[" * 10**5)
    os.mkfifo(tmp_path / "pipe.txt")
    began = time.process_time()
    ended = call(train.main, words.split(" "))
    assert ended.code == 1
    assert WRONG_WORDS[words] in ended.err
    assert time.process_time() - began < MOST_SECONDS


@pytest.mark.parametrize(
    "main", [plan.main, sample.main, evaluate.main, check_model.main], ids=lambda main: main.__module__
)
def test_a_setting_may_be_longer_than_the_name_of_a_file(main: Any) -> None:
    ended = call(main, ["/nowhere.yaml", f"model.negative_prompt={LONG}"])
    assert ended.code == 1
    assert "/nowhere.yaml" in ended.err


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (plan.main, ["\udcff.yaml"]),
        (sample.main, ["\udcff"]),
        (evaluate.main, ["\udcff", "--samples", "1"]),
        (rank.main, ["\udcff", "--reward", "builtin"]),
        (export.main, ["\udcff", "--out", "x"]),
        (reproduce.main, ["table2", "--out", "\udcff"]),
    ],
    ids=["plan", "sample", "evaluate", "rank", "export", "reproduce"],
)
def test_words_that_are_not_utf8_are_refused(main: Any, words: list[str]) -> None:
    ended = call(main, words)
    assert ended.code == 1
    assert "is not UTF-8; rename the file, or write the word in UTF-8" in ended.err


WRONG_OPTIONS = [
    (evaluate.main, "clips --device gpu", "--device gpu: must be auto, cpu, cuda, or cuda:N"),
    (evaluate.main, "clips --device ,", "--device ',' names nothing"),
    (evaluate.main, "clips --metrics ,", "--metrics ',' names nothing"),
    (evaluate.main, "clips --samples 99999999", "--samples 99999999 must be from 1 to 10000"),
    (evaluate.main, "clips --prompts vbensh", "--prompts vbensh is no file; did you mean vbench?"),
    (evaluate.main, "clips --base clips --samples 1", "--base clips is for an adapter, but clips is none"),
    (evaluate.main, "clips --weights clips", "--weights clips: none of the metrics"),
    (plan.main, "--steps 10", "--steps is no option of this command; settings are given as key.path=value"),
    (plan.main, "--gpus 99999999", "--gpus 99999999 must be at most 1024"),
    (rank.main, "clips --reward builtin --time-limit -1", "--time-limit -1 is no time; give seconds above 0"),
    (sample.main, "--count 1000000000", "--count 1000000000 must be from 1 to 10000"),
    (sample.main, "--base clips --prompt x", "--base clips is for an adapter, but no RUN was given"),
    (reproduce.main, f"table2 --seeds {'9' * 20}", "must be at most 1000"),
    (check_model.main, "pairs.txt", "pairs.txt is a file; give the folder of a published model"),
    (check_model.main, "clips --kind wann", "--kind wann: there is no such model family; did you mean wan?"),
]


@pytest.mark.parametrize(
    ("main", "words", "message"), WRONG_OPTIONS, ids=[words for _, words, _ in WRONG_OPTIONS]
)
def test_wrong_options(tmp_path: Path, main: Any, words: str, message: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a fox-0.mp4").touch()
    (tmp_path / "pairs.txt").touch()
    ended = call(main, words.split(" "))
    assert ended.code == 1
    assert message in ended.err


WRONG_PROMPTS: dict[str, tuple[str, Make, str]] = {
    "a pipe": ("p.txt", os.mkfifo, "p.txt is a pipe; write the content to a file first"),
    "holes": ("p.json", holes, "the file has 68,719,476,736 bytes, and JSON is read as a whole"),
    "holes on one line": ("p.txt", holes, "is 0 (NUL)"),
    "a long line": (
        "p.csv",
        text("prompt\n" + "a" * (2 << 20)),
        "line 2: the line has more than 1,048,576 bytes",
    ),
    "deep lists": (
        "p.json",
        text("[" * 10**5),
        "not JSON (lists and objects lie too deep inside one another)",
    ),
    "a deep line": (
        "p.jsonl",
        text('{"prompt":' * 10**5),
        "line 1: not JSON (lists and objects lie too deep",
    ),
    "many columns": ("p.csv", text(",".join(map(str, range(10**4))) + "\n"), "and 9992 more"),
    "terminal": ("p.csv", text("\x1b[2J\na\n"), r"\x1b[2J"),
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_wrong_prompt_files(tmp_path: Path, name: str) -> None:
    file, make, message = WRONG_PROMPTS[name]
    make(tmp_path / file)
    began = time.process_time()
    ended = call(sample.main, ["--prompts", file])
    assert ended.code == 1
    assert message in ended.err
    assert time.process_time() - began < MOST_SECONDS


@pytest.mark.parametrize("head", ["a.txt", "a.tsv\nprompt\n"], ids=["lines", "an open quote"])
def test_the_time_of_a_prompt_file_is_in_proportion_to_its_lines(tmp_path: Path, head: str) -> None:
    name, _, column = head.partition("\n")
    (tmp_path / name).write_text(f'{column}"' + "a\n" * 20_000)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a fox-0.mp4").touch()
    began = time.process_time()
    ended = call(evaluate.main, ["clips", "--prompts", name])
    assert ended.code == 1
    assert "prompts 2 and 3 are both 'a'" in ended.err
    assert time.process_time() - began < MOST_SECONDS


STUDY = {
    "study": "s", "arms": {"policy": "n\x1b[2J", "baseline": "o"},
    "pairs": {"pair-000": {"prompt": "a", "left": "policy", "right": "baseline"}},
}  # fmt: skip
VOTES = {"study": "s", "rater": "Ann", "votes": [{"pair": "pair-000", "choice": "left"}]}


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ('{"study": "s", "rater": "Ann", "votes": [1], "votes": []}', "the key 'votes' is there twice"),
        ('{"study": "s", "rater": "\\ud800", "votes": []}', "half of a \\u surrogate pair"),
        ("[" * 10**5, "lists and objects lie too deep inside one another"),
        (
            '{"study": [[' + "1, " * 10**4 + '1]], "rater": "Ann", "votes": []}',
            "holds votes on the study [[1, 1, 1",
        ),
    ],
    ids=["twice", "half a character", "deep", "long"],
)
def test_wrong_votes(tmp_path: Path, votes: str, message: str) -> None:
    (tmp_path / "study_key.json").write_text(json.dumps(STUDY))
    (tmp_path / "votes.json").write_text(votes)
    ended = call(evaluate.main, ["--study", ".", "--votes", "votes.json"])
    assert ended.code == 1
    assert message in ended.err


def test_the_name_of_a_rater_stays_in_its_line_and_off_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "study_key.json").write_text(json.dumps(STUDY))
    (tmp_path / "votes.json").write_text(json.dumps(VOTES | {"rater": "Ann\n  Bob\x1b[2J"}))
    ended = call(evaluate.main, ["--study", ".", "--votes", "votes.json"])
    assert ended.code == 0
    assert r"Ann\n  Bob\x1b[2J" in ended.out
    assert r"n\x1b[2J against o" in ended.out


@pytest.mark.parametrize("file", ["/etc/passwd", "../key.pem", "/dev/zero", "pipe.mp4"])
def test_a_study_hands_out_nothing_but_videos(tmp_path: Path, file: str) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    video = {"prompt": "a", "index": 0, "policy": {"file": file}, "baseline": {"file": file}}
    arms = {role: {"label": role} for role in ("policy", "baseline")}
    results = {"measures": {}, "settings": {"height": 8, "width": 8}, "arms": arms, "videos": [video]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    ended = call(evaluate.main, ["--study", "."])
    assert ended.code == 1
    assert file in ended.err
    assert not (tmp_path / "study").exists()


def test_results_without_their_parts_are_named_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        '{"measures": {}, "videos": [], "arms": {"policy": {}, "baseline": {}}}'
    )
    ended = call(evaluate.main, ["--study", "."])
    assert ended.code == 1
    assert "results.json is damaged" in ended.err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": "x"}', "line 1 has loss='x', which no run logs"),
        ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": NaN}', "line 1 is not JSON (NaN is no number of JSON)"),
        ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": 1e308}', "loss=1e+308, which no run logs"),
        ("metrics.jsonl", '{"step": 1, "kind": ["train"]}', "kind=['train'], which no run logs"),
        ("metrics.jsonl", "[" * 10**5, "line 1 is not JSON (lists and objects lie too deep"),
        ("alarms.jsonl", '{"step": 1, "kind": 5, "text": "a"}', "alarms.jsonl' is damaged"),
        ("alarms.jsonl", '{"step": 1, "kind": "a", "text": ["a"]}', "alarms.jsonl' is damaged"),
        ("summary.json", '{"clips": 1, "measures": {"a": {}}, "timings": {}}', "summary.json' is damaged"),
        ("summary.json", '{"clips": 1, "measures": {}, "timings": {"a": 1e400}}', "summary.json' is damaged"),
        ("config.yaml", BOMB, "aliases (*name) repeat values"),
    ],
)  # fmt: skip
def test_wrong_files_of_a_run(tmp_path: Path, file: str, content: str, message: str) -> None:
    RunDirectory.create_at(tmp_path / "run", "steps: 3\n")
    (tmp_path / "run" / file).write_text(content + "\n")
    ended = call(lambda words: report.main(words), ["run"])  # type: ignore[func-returns-value]
    assert ended.code == 1
    assert message in ended.err


def test_nothing_is_written_through_links_of_a_run(tmp_path: Path) -> None:
    RunDirectory.create_at(tmp_path / "run", "steps: 3\n")
    (tmp_path / "mine").write_text("kept")
    for name in (".report.html.tmp", "report.html"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    assert call(lambda words: report.main(words), ["run"]).code == 0  # type: ignore[func-returns-value]
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        RunLock(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "kept"
    assert "<!doctype html>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "[", "(a|a)*b"])
def test_patterns_of_an_adapter_that_would_hang(tmp_path: Path, pattern: str) -> None:
    network = torch.nn.Sequential()
    network.add_module("a" * 60, torch.nn.Linear(2, 2))
    tensors = {f"base_model.model.{'a' * 60}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {pattern: 2}}))
    with pytest.raises(ValueError, match=r"alpha_pattern"):
        read_adapter(tmp_path / "adapter_model.safetensors", network, {}.get, "it")


def test_a_name_of_a_video_that_no_page_could_show(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/clips/caf\xe9-0.mp4")).touch()
    ended = call(rank.main, ["clips", "--reward", "builtin"])
    assert ended.code == 1
    assert r"the name b'caf\xe9-0.mp4' is not UTF-8; rename the file" in ended.err


def test_a_pipe_among_videos_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    os.mkfifo(tmp_path / "clips" / "a-0.mp4")
    ended = call(rank.main, ["clips", "--reward", "builtin"])
    assert ended.code == 1
    assert "a-0.mp4 is a pipe" in ended.err
