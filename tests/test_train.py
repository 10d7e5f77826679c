"""Whole runs through the entry point: files, resume, signals, several processes, faults."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from power_cut import power_cut
from process_group import Group
from safetensors.torch import load_file
from scorer_that import train_with_a_scorer_that

from vpo_engine import sample
from vpo_engine import train as entry
from vpo_engine.config import Config
from vpo_engine.models.opensora.checkpoint import load_config as load_model_config
from vpo_engine.models.opensora.checkpoint import load_strict
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.runs.log import read_metrics
from vpo_engine.runs.video import read_video
from vpo_engine.train import train

Make = Callable[..., Config]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    root = run / "checkpoints" / f"step_{step:08d}"
    files = [
        root / "policy" / "model.safetensors",
        root / "reference.safetensors",
        root / "optimizer.safetensors",
    ]
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


def numbers(run: Path) -> list[dict[str, object]]:
    """Metric rows without what a clock wrote."""
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "speed/"))}
        for row in rows
    ]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    assert numbers(one) == numbers(other)
    first, second = weights(one, step), weights(other, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def finished(smallest: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps to its end, by the command line."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert entry.main([*smallest, f"run_dir={run}"]) == 0
    return run


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "gallery/held_out.safetensors",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").iterdir())
    assert list((finished / "gallery/pairs").iterdir())
    train_rows = [row for row in read_metrics(finished / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4]
    wanted = (
        "loss margin winner_error_change loser_error_change tie_rate grad_norm lr reward/selected reward/gap"
    )
    assert set(wanted.split()) <= train_rows[0].keys()
    refreshed = [True, *(row["reference_age"] == 0 for row in train_rows[:-1])]
    assert ["implicit_accuracy" not in row for row in train_rows] == refreshed
    assert any(refreshed[1:]), "a refresh within the run"
    stages = {"text", "rollout", "decode", "reward", "update", "refresh", "step"}
    assert {f"seconds/{stage}" for stage in stages} <= train_rows[0].keys()
    assert "seconds/evaluate" in train_rows[0]  # of the base policy, before the first step
    assert "seconds/checkpoint" in train_rows[2]  # made after the second step
    eval_rows = [row for row in read_metrics(finished / "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["step"] for row in eval_rows] == [0, 2, 4]
    kinds = {name.rsplit("/", 1)[0] for name in eval_rows[0] if "/" in name}
    held_out = {"held_out/reward", "held_out/judge", "held_out/pixels"}
    assert kinds == {*held_out, "guards", "guards/style", "guards/prompt"}
    assert (finished / "alarms.jsonl").is_file()


def test_the_same_seed_gives_the_same_run(finished: Path, small: Make, tmp_path: Path) -> None:
    assert train(small()) == 0
    assert_same_run(finished, tmp_path / "run", 4)


@pytest.mark.long
def test_another_seed_gives_another_run(finished: Path, small: Make, tmp_path: Path) -> None:
    """One step is enough to tell: its candidates, hence its scores, are others."""
    assert train(small("seed=1", "steps=1")) == 0
    one, other = (
        next(row for row in numbers(run) if row["kind"] == "train") for run in (finished, tmp_path / "run")
    )
    assert one["step"] == other["step"] == 1
    assert one["reward/selected"] != other["reward/selected"]


@pytest.mark.long
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    finished: Path, small: Make, tmp_path: Path
) -> None:
    with power_cut(after=3):
        train(small("checkpoint.keep=5"))
    assert train(small("checkpoint.keep=5", "checkpoint.resume=true")) == 0
    assert_same_run(finished, tmp_path / "run", 4)
    state = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())
    assert state["optimizer_steps"] == 2
    assert state["prompt_cursor"] == 4
    timings = json.loads((tmp_path / "run/summary.json").read_text())["timings"]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert timings["rollout"] == pytest.approx(sum(row.get("seconds/rollout", 0.0) for row in rows))


def test_resume_refuses_other_settings(finished: Path, small: Make) -> None:
    with pytest.raises(
        ValueError,
        match=r"with other settings \(there -> now\): objective\.beta: 250 -> 9\. Resume",
    ):
        train(small(f"run_dir={finished}", "checkpoint.resume=true", "objective.beta=9"))


def test_an_occupied_run_directory_is_refused(finished: Path, small: Make) -> None:
    with pytest.raises(ValueError, match=r"already holds a run; go on with it by checkpoint\.resume=true"):
        train(small(f"run_dir={finished}", "checkpoint.resume=false"))


def test_an_altered_checkpoint_is_named_and_the_earlier_one_offered(
    finished: Path, small: Make, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    damaged = tmp_path / "run/checkpoints/step_00000004/reference.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"reference\.safetensors' was altered after it was saved.*step_00000002"
    ):
        train(small("checkpoint.resume=true", "steps=6"))


def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(
    smallest: list[str],
    small: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = safetensors.torch.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert entry.main([*smallest, f"run_dir={tmp_path / 'run'}"]) == 1
    message = capsys.readouterr().err
    assert "error:" in message
    assert "step_00000004" in message
    assert "disk" in message
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]
    assert weights(tmp_path / "run", 2)


def test_the_saved_policy_loads_strictly_under_the_published_layout(finished: Path) -> None:
    folder = finished / "checkpoints/step_00000004/policy"
    network = STDiT3.from_config(load_model_config(folder))
    load_strict(network, folder)
    trained = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_sample_writes_videos_of_a_run(finished: Path, tmp_path: Path) -> None:
    arguments = [
        str(finished),
        "--prompt",
        "a red circle moving left",
        "--count",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert sample.main(arguments) == 0
    files = sorted(tmp_path.glob("*.mp4"))
    assert [file.name for file in files] == [
        "0000-a-red-circle-moving-left-0.mp4",
        "0000-a-red-circle-moving-left-1.mp4",
    ]
    frames, rate = read_video(files[0])
    assert (len(frames), rate) == (17, 8.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["rollout.candidates=1"], "rollout.candidates=1 must be at least 2"),
        (["reference.refresh_every=0"], "reference.refresh_every=0"),
        (["objective.beta=-1"], "objective.beta=-1"),
        (["objective.bata=1"], "did you mean objective.beta?"),
        (["prompts.train=absent.txt"], "absent.txt"),
        (["absent.yaml"], "no configuration file absent.yaml"),
        (["model.policy=absent"], "absent"),
    ],
)
def test_wrong_input_is_one_clear_line(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert text in captured.err
    assert captured.err.count("\n") == 1


def test_bad_prompt_files_are_named_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"a red circle moving left\n\xff\xfe\n")
    assert entry.main([f"prompts.train={bad}", f"run_dir={tmp_path / 'run'}"]) == 1
    message = capsys.readouterr().err
    assert "bad.txt" in message
    assert "line 2" in message
    assert not (tmp_path / "run").exists()


def test_a_reward_of_nan_stops_the_run(
    smallest: list[str],
    small: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vpo_engine.rewards.sprites import SpritesReward

    score = SpritesReward.score

    def broken(self: SpritesReward, videos: torch.Tensor, prompts: object) -> dict[str, torch.Tensor]:
        scores = score(self, videos, prompts)  # type: ignore[arg-type]
        return {name: value * float("nan") for name, value in scores.items()}

    monkeypatch.setattr(SpritesReward, "score", broken)
    assert entry.main([*smallest, f"run_dir={tmp_path / 'run'}"]) == 1
    assert "nan" in capsys.readouterr().err


@pytest.mark.usefixtures("unplanned")  # as are processes of a group
@pytest.mark.long
def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(
    smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [
        *smallest,
        small_policy,
        "steps=100000",
        "evaluation.every=null",
        "checkpoint.every=null",
        f"run_dir={run}",
    ]
    group = Group(tmp_path, 1, entry.main, arguments)
    log = run / "metrics.jsonl"
    while group.processes[0].is_alive() and not (log.exists() and log.read_text().count('"train"') >= 2):
        time.sleep(0.05)
    group.processes[0].terminate()  # sends SIGTERM
    output = group.wait(expected=143)
    assert "giving up what is not finished, then saving step" in output
    assert "stopped by SIGTERM after step" in output
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[-1]["step"] == step
    finish = [*arguments, "checkpoint.resume=true", f"steps={step + 1}"]
    assert entry.main(finish) == 0
    assert (run / "report.html").exists()


def torchrun(arguments: list[str]) -> None:
    """Train in two processes as the README does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "-m", "vpo_engine.train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_two_processes_train_as_one(finished: Path, smallest: list[str], tmp_path: Path) -> None:
    """Each takes its own prompts; log and policy agree with a single process up to rounding."""
    double = tmp_path / "double"
    torchrun([*smallest, f"run_dir={double}"])
    first, second = numbers(finished), numbers(double)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert one["kind"] == other["kind"]
        for name in one.keys() - {"kind"}:
            assert other[name] == pytest.approx(one[name], rel=2e-2, abs=2e-3), name
    policies = [
        load_file(run / "checkpoints/step_00000004/policy/model.safetensors") for run in (finished, double)
    ]
    for name, value in policies[0].items():
        other = policies[1][name]
        if name.endswith("cross_attn.kv_linear.bias"):
            # A bias that all keys share cancels in the softmax: its gradient is rounding, of which Adam makes a step.
            value, other = value.chunk(2)[1], other.chunk(2)[1]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.usefixtures("unplanned")  # as are processes of a group
@pytest.mark.long
def test_a_run_with_a_process_for_the_reward_goes_on_without_it_bit_for_bit(
    finished: Path, smallest: list[str], small: Make, tmp_path: Path
) -> None:
    """The process with the reward model is asked to stop in step 2, and with it all; one process does the rest."""
    run = tmp_path / "run"
    arguments = [*smallest, f"run_dir={run}", "processes.reward=true"]
    group = Group(
        tmp_path, 2, train_with_a_scorer_that, "stops", 2, arguments, threads=torch.get_num_threads()
    )
    output = group.wait(expected=143)
    assert "stopped by a signal to another process after step 2" in output
    assert train(small("checkpoint.resume=true")) == 0
    assert_same_run(finished, run, 4)


@pytest.mark.long
def test_a_scorer_that_fails_ends_every_process_with_its_error(
    smallest: list[str], small_policy: str, tmp_path: Path
) -> None:
    """Of two that train one asks and one waits for the other; no time limit of the process group has to pass.

    There is no torchrun here to end the others when one has failed: each ends by itself.
    """
    run = tmp_path / "run"
    shares = ["rollout.candidates=4", "processes.per_prompt=2", "processes.reward=true"]
    arguments = [*smallest, small_policy, *shares, f"run_dir={run}"]
    group = Group(tmp_path, 3, train_with_a_scorer_that, "fails", 3, arguments)
    output = group.wait(expected=1)
    assert output.count("error: the scorer broke down\n") == 3, output
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1]


def test_one_process_cannot_be_given_away(small: Make) -> None:
    with pytest.raises(
        ValueError, match="gives the last of 1 processes to the reward model, which leaves none"
    ):
        train(small("processes.reward=true"))


def test_prompts_that_cannot_be_shared_equally_are_refused(small: Make) -> None:
    from vpo_engine.distributed.processes import Processes

    with pytest.raises(ValueError, match=r"pairs_per_step=3 cannot be shared equally by 2 processes"):
        Processes(0, 2, torch.device("cpu")).team_range(3, "pairs_per_step")
