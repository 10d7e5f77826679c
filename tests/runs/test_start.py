"""Test where a run begins (a new directory, its newest checkpoint, another one), and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vpo_engine.config_file import dump_config, load_config
from vpo_engine.runs import checkpoint as saved
from vpo_engine.runs.attempts import begin_attempt
from vpo_engine.runs.checkpoint import save_checkpoint, step_of
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.start import Start, check_same_run, find_start

Make = Callable[..., Path]


@pytest.fixture
def a_run(tmp_path: Path) -> Make:
    """Make a run directory with checkpoints of these steps, as a stopped or a finished run leaves it."""

    def make(*steps: int, name: str = "run", finished: bool = False) -> Path:
        root = tmp_path / name
        Start(root).open(load_config(None))
        for step in steps:
            save_checkpoint(
                root / "checkpoints", step, tensors={}, state={"step": step}, write_policy=None, keep=99
            )
        if finished:
            (root / "summary.json").write_text("{}")
        return root

    return make


def start_of(root: Path, *overrides: str) -> Start:
    return find_start(load_config(None, [f"run_dir={root}", *overrides]))


def refused(root: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=re.escape(str(root.name))) as caught:
        start_of(root, *overrides)
    return str(caught.value)


def test_a_new_directory_begins_at_the_first_step(tmp_path: Path) -> None:
    assert start_of(tmp_path / "new") == Start(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    assert start_of(tmp_path / "empty") == Start(tmp_path / "empty")
    assert find_start(load_config(None)) == Start(None)


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_a_stopped_run_goes_on_from_its_newest_checkpoint(a_run: Make, resume: str) -> None:
    root = a_run(20, 30)
    newest = root / "checkpoints/step_00000030"
    assert start_of(root, f"checkpoint.resume={resume}") == Start(root, newest, exists=True)


def test_a_run_that_saved_nothing_begins_again_only_without_being_asked_to_resume(a_run: Make) -> None:
    root = a_run()
    assert start_of(root) == Start(root, exists=True)
    assert "no complete checkpoint to go on from, because the run ended before it saved one" in refused(
        root, "checkpoint.resume=true"
    )


def test_a_finished_run_is_told_from_one_that_was_made_longer(a_run: Make) -> None:
    root = a_run(20, 40, finished=True)
    assert start_of(root).finished
    assert start_of(root, "checkpoint.resume=true").finished
    assert not start_of(root, "steps=50").finished
    assert not start_of(root, "checkpoint.from=20").finished
    (root / "summary.json").unlink()  # it ended within the evaluation at the end
    assert not start_of(root).finished


def test_a_typo_in_run_dir_is_not_a_new_run(a_run: Make, tmp_path: Path) -> None:
    a_run(20, name="first-run")
    message = refused(tmp_path / "frist-run", "checkpoint.resume=true")
    assert f"no run to resume at {tmp_path / 'frist-run'}; did you mean {tmp_path / 'first-run'}?" in message
    assert "leave out checkpoint.resume=true" in message


def test_without_run_dir_the_newest_of_the_name_is_resumed(
    a_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no directory runs/sprites-\* holds one; give its run_dir"):
        find_start(load_config(None, ["checkpoint.resume=true"]))
    (tmp_path / "runs").mkdir()
    for number, name in enumerate(("sprites-1", "sprites-2", "other-3")):
        root = a_run(20, name=f"runs/{name}")
        os.utime(root / "config.yaml", (number, number))
    found = find_start(load_config(None, ["checkpoint.resume=true"]))
    assert found.root == Path("runs/sprites-2")
    assert find_start(load_config(None)) == Start(None)


def test_what_torchrun_starts_again_goes_on(
    a_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    root = a_run(20, name="runs/sprites-1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_start(load_config(None)).checkpoint == Path("runs/sprites-1/checkpoints/step_00000020")
    assert find_start(load_config(None, ["checkpoint.resume=false"])) == Start(None)
    shutil.rmtree(root)
    assert find_start(load_config(None)) == Start(None)


def test_checkpoints_that_are_all_damaged_are_not_the_first_step(a_run: Make) -> None:
    root = a_run(20, 30)
    for step in (20, 30):
        (root / f"checkpoints/step_000000{step}/manifest.json").unlink()
    for resume in ("auto", "true"):
        message = refused(root, f"checkpoint.resume={resume}")
        assert "no complete checkpoint to go on from" in message
        assert message.count("has no manifest.json, so its saving was interrupted") == 2


def test_a_checkpoint_is_chosen_by_step_or_by_path(a_run: Make, tmp_path: Path) -> None:
    root = a_run(10, 20, 30)
    wanted = root / "checkpoints/step_00000020"
    assert start_of(root, "checkpoint.from=20").checkpoint == wanted
    assert start_of(root, f"checkpoint.from={wanted}").checkpoint == wanted
    assert find_start(load_config(None, [f"checkpoint.from={wanted}"])).root == root
    assert "has no complete checkpoint step_00000025; it has those of steps 10, 20, 30" in refused(
        root, "checkpoint.from=25"
    )
    other = a_run(20, name="other")
    assert f"is a checkpoint of the run {root}, but run_dir={other}" in refused(
        other, f"checkpoint.from={wanted}"
    )
    assert "no run to resume" in refused(tmp_path / "new", "checkpoint.from=20")


def test_another_runs_directory_is_refused_with_what_differs(a_run: Make, tmp_path: Path) -> None:
    root = a_run(20)
    message = refused(root, "objective.beta=100", "optimizer.clip=null", "memory.sequential=true", "steps=60")
    assert (
        "objective.beta: 250 -> 100; optimizer.clip: 1 -> null; memory.sequential: false -> true. " in message
    )
    assert "steps: " not in message
    assert "already holds a run" in refused(root, "checkpoint.resume=false")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert "the directory is not empty and was not made by a run" in refused(tmp_path / "mine")
    assert "there is a file with that name" in refused(tmp_path / "mine/thesis.tex")


def test_fewer_steps_than_were_made_are_refused(a_run: Make) -> None:
    root = a_run(20, 30)
    assert "step_00000030 is at step 30, beyond steps=25; raise steps" in refused(root, "steps=25")
    assert "is at step 30, beyond steps=25" in refused(root, "steps=25", "checkpoint.from=30")
    assert start_of(root, "steps=25", "checkpoint.from=20").checkpoint == root / "checkpoints/step_00000020"


def test_a_resumed_run_keeps_the_batch_size_that_was_planned(a_run: Make) -> None:
    root = a_run(20)
    config = load_config(None, ["rollout.batch_size=6"])
    (root / "config.yaml").write_text(dump_config(config))
    check_same_run(load_config(None), root / "config.yaml")
    assert "rollout.batch_size: 6 -> 8" in refused(root, "rollout.batch_size=8")


def test_the_saved_configuration_has_the_new_steps_and_does_not_ask_to_resume(a_run: Make) -> None:
    root = a_run(20)
    config = load_config(
        None, [f"run_dir={root}", "checkpoint.from=20", "checkpoint.resume=true", "steps=50"]
    )
    find_start(config).open(config)
    saved = load_config(root / "config.yaml")
    assert (saved.steps, saved.checkpoint.resume, saved.checkpoint.from_) == (50, "auto", None)
    assert not list(root.glob(".*"))


def test_a_state_that_is_no_json_is_not_hidden(a_run: Make) -> None:
    root = a_run(20)
    manifest = root / "checkpoints/step_00000020/manifest.json"
    manifest.write_text(json.dumps({"step": 20}))
    assert re.search("is not the manifest of a checkpoint", refused(root))


def test_a_resumed_run_keeps_the_memory_settings_that_were_planned(a_run: Make) -> None:
    root = a_run(20)
    config = load_config(None, ["memory.preset=balanced", "memory.mlp_chunks=2"])
    (root / "config.yaml").write_text(dump_config(config))
    check_same_run(load_config(None, ["memory.preset=balanced"]), root / "config.yaml")
    assert "memory.preset: balanced -> fast" in refused(root, "memory.preset=fast")


@pytest.mark.parametrize(
    "changed",
    [
        "disk.limit_gib=9",
        "name=other",
        "distributed.stage_minutes=60",
        "evaluation.every=7",
        "checkpoint.keep=9",
        "processes.reward=true",
        "log.wandb=mine",
        "memory.overcommit=true",
        "memory.limit_gib=99",
        "prompts.cache=texts",
    ],
)
def test_what_changes_no_result_may_differ_when_a_run_goes_on(a_run: Make, changed: str) -> None:
    root = a_run(20)
    assert start_of(root, changed) == Start(root, root / "checkpoints/step_00000020", exists=True)


@pytest.mark.parametrize("name", ["my_run", "a run", "sprites"])
def test_what_is_started_again_finds_its_own_run_and_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Start(None).open(load_config(None, [f"name={name}"])).root
    Start(None).open(load_config(None, [f"name={name}-fast"]))
    os.utime(own / "config.yaml", (1, 1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_start(load_config(None, [f"name={name}"])) == Start(own, exists=True)


def test_memory_settings_that_no_plan_chooses_are_not_dropped_when_a_run_goes_on(a_run: Make) -> None:
    root = a_run(20)
    (root / "config.yaml").write_text(dump_config(load_config(None, ["memory.preset=balanced"])))
    message = refused(root, "memory.preset=balanced", "memory.optimizer_bits=8", "memory.mlp_chunks=4")
    assert "memory.optimizer_bits: 32 -> 8" in message
    assert "memory.mlp_chunks: 1 -> 4" in message


def test_another_number_of_held_out_prompts_is_refused_by_its_setting(a_run: Make) -> None:
    assert "evaluation.prompts: null -> 3, and the base was evaluated so" in refused(
        a_run(20), "evaluation.prompts=3"
    )


def test_what_torchrun_starts_again_keeps_what_it_has_saved_since_it_went_back(
    a_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saves remove the checkpoint that was named; the next job, by the same command, goes back again."""
    root = a_run(10, 20)
    twentieth, run = root / "checkpoints/step_00000020", RunDirectory.open(root)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    for restart, made, newest in ((0, 15, "15"), (1, None, "15"), (2, 17, "17")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        chosen = start_of(root, "checkpoint.from=10").checkpoint
        assert chosen == root / f"checkpoints/step_000000{'10' if restart == 0 else '15'}"
        begin_attempt(run, step_of(chosen))
        if made is not None:
            save_checkpoint(root / "checkpoints", made, tensors={}, state={}, write_policy=None, keep=9)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart + 1))
        found = start_of(root, "checkpoint.from=10").checkpoint
        assert found == root / f"checkpoints/step_000000{newest}"
    assert not twentieth.exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert start_of(root, "checkpoint.from=10").checkpoint == root / "checkpoints/step_00000010"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "9")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    assert start_of(root, "checkpoint.from=10").checkpoint == root / "checkpoints/step_00000010"


def test_what_torchrun_starts_again_goes_back_again_if_nothing_was_saved(
    a_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = a_run(10, 20)
    begin_attempt(RunDirectory.open(root), 10)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start_of(root, "checkpoint.from=10").checkpoint == root / "checkpoints/step_00000010"


def test_a_job_that_slurm_requeues_keeps_what_it_has_saved_since_it_went_back(
    a_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun counts from 0 again, and the checkpoint that the command names is gone."""
    root = a_run(10, 20)
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "17")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    begin_attempt(RunDirectory.open(root), 10)
    for step in (15, 25):
        save_checkpoint(root / "checkpoints", step, tensors={}, state={}, write_policy=None, keep=2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start_of(root, "checkpoint.from=10").checkpoint == root / "checkpoints/step_00000025"


def test_what_was_killed_before_its_configuration_was_in_place_starts_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for name in ("run.lock", ".config.yaml.tmp"):
        (root / name).touch()
    start_of(root).open(load_config(None))
    assert (root / "config.yaml").is_file()


def test_another_command_of_a_slurm_job_goes_back_though_its_first_attempt_left_no_word(
    a_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = a_run(10, 20)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    begin_attempt(RunDirectory.open(root), 0)
    save_checkpoint(root / "checkpoints", 30, tensors={}, state={}, write_policy=None, keep=9)
    monkeypatch.setattr(os, "getppid", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start_of(root, "checkpoint.from=10").checkpoint == root / "checkpoints/step_00000010"


def test_a_kill_among_the_deletions_of_a_run_that_goes_back_does_not_turn_it_round(
    a_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = a_run(10, 20, 30)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    begin_attempt(RunDirectory.open(root), 10)
    found, delete = saved._all_saved, saved._delete

    def dies(path: Path) -> None:
        delete(path)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(saved, "_all_saved", lambda folder: dict(sorted(found(folder).items(), reverse=True)))
        patch.setattr(saved, "_delete", dies)
        with pytest.raises(RuntimeError, match="killed"):
            saved.delete_after(root / "checkpoints", 10)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start_of(root, "checkpoint.from=10").checkpoint == root / "checkpoints/step_00000010"
