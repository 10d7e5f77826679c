"""The words of a command line, and how errors of users reach them: one line, an exit code, no traceback, no delay."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vpo_engine import train as entry
from vpo_engine.command import split_words
from vpo_engine.runs.lock import RunLock


@pytest.mark.parametrize(
    ("words", "source", "overrides"),
    [
        ([], None, []),
        (["a.yaml"], "a.yaml", []),
        (["steps=4"], None, ["steps=4"]),
        (["steps=4", "a.yaml", "seed=1"], "a.yaml", ["steps=4", "seed=1"]),
        (["a.yaml", "prompts.train=x=y.txt"], "a.yaml", ["prompts.train=x=y.txt"]),
    ],
)
def test_a_configuration_and_settings_come_in_any_order(
    words: list[str], source: str | None, overrides: list[str]
) -> None:
    assert split_words(words) == (source, overrides)


def test_a_file_with_an_equals_sign_in_its_path_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lr=1e-4.yaml"
    path.touch()
    assert split_words([str(path), "steps=4"]) == (str(path), ["steps=4"])


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vpo_engine.rank", "--list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


WRONG = {
    "--steps 10": "--steps is no option of this command; settings are given as key.path=value, for example steps=...",
    "--steps=10": "--steps=10 is no option of this command",
    "steps=4 sprites.yaml sprites_fast.yaml": "sprites.yaml and sprites_fast.yaml are both taken for configuration",
    "objective.bta=2": "unknown key objective.bta; did you mean objective.beta?",
    "sprits": "there is no configuration file sprits; did you mean sprites?",
    "exp/sprites.yaml": "there is no configuration file exp/sprites.yaml; check the path",
    "model.policy=/nowhere": "model.policy=/nowhere: there is no such folder or weights file; check the path",
    "prompts.train=/nowhere.txt": "prompts.train=/nowhere.txt: there is no such file; check the path",
    "model.device=gpu": "must be auto, cpu, cuda, or cuda:N for one of several GPUs; did you mean cuda?",
    "reward.kind=pikscore": "reward.kind=pikscore: there is no such reward; did you mean pickscore?",
    "reward.path=weights": "reward.path=weights has no meaning for reward.kind=sprites",
    "model.resolution=480p": "model.resolution=480p has no meaning for model.kind=sprites",
    "steps=many": "steps=many must be a whole number",
    "steps=0": "steps=0 must be at least 1",
    "run_dir=gone checkpoint.resume=true": "there is no run to resume at gone",
    "run_dir=gone checkpoint.from=3": "there is no run to resume at gone",
    "memory.offload_activations=true": "memory.activation_checkpointing=none keeps many times as much on the device",
    "steps=": "steps=null must be a whole number",
    "=3": "expected key.path=value, got '=3'",
}


def test_an_adapter_without_peft_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    assert entry.main(["model.lora.rank=4", "reference.storage=adapter"]) == 1
    assert (
        'model.lora needs PEFT, which is not installed; pip install "vpo-engine[lora]"'
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_one_line(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry.main(words.split()) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert WRONG[words] in said.err
    assert not list(tmp_path.iterdir())


def test_what_the_configuration_tells_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    """Also an occupied run directory, a run with other settings, and --help."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("objective: {beta: 7}\n")
    commands = (
        ["objective.bta=2"],
        [f"run_dir={run}"],
        [f"run_dir={run}", "checkpoint.resume=true"],
        ["--help"],
    )
    code = (
        "import sys; from vpo_engine import train\n"
        f"for words in {commands!r}:\n"
        "    try: train.main(words)\n"
        "    except SystemExit: pass\n"
        "print({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 20, "seconds of the processor, whoever else uses the machine"
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stderr.count("error: ") == 3


def test_a_bad_row_at_the_end_of_a_large_file_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    """The file has 20 MB. A run that finds no mistake reads it once."""
    prompts = tmp_path / "train.csv"
    prompts.write_text("caption\n" + f"{'a red circle moves left ' * 40}\n" * 20_000 + '""\n')
    words = [f"prompts.train={prompts}", "prompts.column=caption", f"run_dir={tmp_path / 'run'}"]
    code = f"import sys; from vpo_engine import train; print(train.main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
    assert f"error: {prompts}, line 20002: " in done.stderr


def test_prompt_files_are_read_once_unless_they_change(tmp_path: Path) -> None:
    from vpo_engine.config import PromptsConfig
    from vpo_engine.data.prompt_settings import check_prompt_files, open_prompt_files

    path = tmp_path / "train.txt"
    settings = PromptsConfig(train=path)

    def read() -> list[str]:
        return list(open_prompt_files(settings)[0]["train"])

    path.write_text("one\ntwo\n")
    check_prompt_files(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpo_engine.data.prompt_settings.PromptFile", None)
        assert read() == ["one", "two"]
    assert read() == ["one", "two"]
    check_prompt_files(settings)
    path.write_text("three\n")
    assert read() == ["three"]
    check_prompt_files(settings)
    (tmp_path / "other").write_text("seven\n")
    (tmp_path / "other").replace(path)
    assert read() == ["seven"]


def test_under_torchrun_one_process_speaks_and_its_word_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as left:
        entry.main(["objective.bta=2"])
    assert left.value.code == 0  # torchrun then waits for the first process, which fails
    assert capsys.readouterr().err == ""
    assert not report.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")  # of a second machine, whose files may differ
    assert entry.main(["objective.bta=2"]) == 1
    assert re.search("unknown key objective.bta", json.loads(report.read_text())["message"]["message"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_in_use_is_refused_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vpo_engine.training", None)  # importing it would fail
    run = tmp_path / "run"
    run.mkdir()
    with RunLock(run):
        assert entry.main([f"run_dir={run}"]) == 1
        assert f"{run} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not list(run.iterdir())


def test_a_missing_file_is_named_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        entry.main(["model.policy=/nowhere"])
