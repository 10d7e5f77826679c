"""Runs with a moving average of the policy: what it changes, which is evaluations, and nothing else."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import torch
from lora_case import LORA, PROMPT, Make
from power_cut import copy_cut
from safetensors.torch import load_file
from torch import Tensor

from vpo_engine import sample
from vpo_engine import train as entry
from vpo_engine.build import build_held_out, build_model, build_prompts, build_reward
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.planning.trace import trace_step
from vpo_engine.runs.checkpoint import verify_checkpoint
from vpo_engine.runs.log import read_metrics

MASTERS = ("memory.weights=fp32_master", "reference.storage=exact8", "optimizer.lr=1e-3")
KINDS = {"adapter": LORA, "masters": MASTERS}
EMA = "ema.decay=0.15"
"""Above the (1 + n) / (10 + n) of the first step, below that of the second."""


@pytest.fixture(scope="module", params=["adapter", pytest.param("masters", marks=pytest.mark.long)])
def runs(
    request: pytest.FixtureRequest,
    smallest: list[str],
    small_policy: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, Path]:
    """A kind of training, with a run without an average and the same with one."""
    folder, shared = tmp_path_factory.mktemp("ema"), [*smallest, small_policy, *KINDS[request.param]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpo_engine.training.check_fits", lambda config, *_: (config, ""))
        for name, settings in (("plain", ()), ("ema", (EMA,))):
            assert entry.main([*shared, *settings, f"run_dir={folder / name}"]) == 0
    return request.param, folder / "plain", folder / "ema"


def files(run: Path, pattern: str) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(run)}:{name}": value
        for file in sorted(run.glob(pattern))
        for name, value in load_file(file).items()
    }


def rows(run: Path, kind: str) -> list[dict[str, object]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "speed/", "ema/"))}
        for row in read_metrics(run / "metrics.jsonl")
        if row["kind"] == kind
    ]


def test_rollouts_pairs_gradients_and_the_policy_are_those_of_a_run_without(
    runs: tuple[str, Path, Path],
) -> None:
    _, plain, ema = runs
    assert rows(plain, "train") == rows(ema, "train")
    for pattern in (
        "checkpoints/*/*.safetensors",
        "checkpoints/*/policy/*.safetensors",
        "gallery/pairs/*.safetensors",
    ):
        one, other = files(plain, pattern), files(ema, pattern)
        assert len(one) > 2
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(plain, "eval")[0] == rows(ema, "eval")[0]
    assert rows(plain, "eval")[1:] != rows(ema, "eval")[1:]


def test_checkpoints_hold_the_average_in_the_policys_layout(runs: tuple[str, Path, Path]) -> None:
    _, _, ema = runs
    for step in (2, 4):
        checkpoint = ema / "checkpoints" / f"step_{step:08d}"
        names = set(verify_checkpoint(checkpoint)["files"])
        layout = {name.removeprefix("policy/") for name in names if name.startswith("policy/")}
        assert {name.removeprefix("ema/") for name in names if name.startswith("ema/")} == layout
        policy, average = files(checkpoint, "policy/*.safetensors"), files(checkpoint, "ema/*.safetensors")
        assert [name.partition(":")[2] for name in policy] == [name.partition(":")[2] for name in average]
        moved = [not torch.equal(a, b) for a, b in zip(policy.values(), average.values(), strict=True)]
        assert any(moved)
        assert {value.dtype for value in average.values()} == {torch.float32}


def test_evaluations_are_those_of_the_average(
    runs: tuple[str, Path, Path], smallest: list[str], small_policy: str
) -> None:
    """A model that reads the folder of the average, and evaluates it anew."""
    kind, _, ema = runs
    config = load_config(None, [*smallest, small_policy, *KINDS[kind], EMA])
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    reward = build_reward(config, processes.device)
    _, prompts = build_prompts(config)
    model.prepare(prompts)
    held_out = build_held_out(config, model, prompts, reward, processes)
    logged = {row["step"]: row for row in read_metrics(ema / "metrics.jsonl") if row["kind"] == "eval"}
    assert set(logged) == {0, 2, 4}
    for step in (2, 4):
        model.load_policy(ema / "checkpoints" / f"step_{step:08d}" / "ema")
        found = held_out.evaluate(model.network, 1)
        for name, value in found.items():
            if not name.startswith("style/"):
                assert logged[step][f"held_out/{name}"] == float(value.mean()), name


def test_log_summary_and_report_say_which_weights_were_evaluated(
    runs: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain, ema = runs
    said = "The final videos are those of the policy's moving average (ema.decay=0.15)."
    assert said in html.unescape((ema / "report.html").read_text())
    assert "moving average" not in (plain / "report.html").read_text()
    assert json.loads((ema / "summary.json").read_text())["ema_decay"] == 0.15
    assert "ema_decay" not in json.loads((plain / "summary.json").read_text())
    found = read_metrics(ema / "metrics.jsonl")
    assert [row["ema/decay"] for row in found if row["kind"] == "train"] == [0.1, 0.15, 0.15, 0.15]
    assert [row["ema/decay"] for row in found if row["kind"] == "eval"] == [0.1, 0.15, 0.15]
    assert not any("ema/decay" in row for row in read_metrics(plain / "metrics.jsonl"))


def test_sample_shows_the_weights_that_were_evaluated(runs: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, plain, ema = runs
    for name, run in (("plain", plain), ("ema", ema)):
        assert sample.main([str(run), "--prompt", PROMPT, "--out", str(tmp_path / name)]) == 0
    (one,), (other,) = ((tmp_path / name).glob("*.mp4") for name in ("plain", "ema"))
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.long
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    runs: tuple[str, Path, Path], unplanned: None, small: Make, small_policy: str, tmp_path: Path
) -> None:
    kind, _, whole = runs
    copy_cut(whole, tmp_path / "run", 2)
    assert entry.train(small(small_policy, *KINDS[kind], EMA, "checkpoint.resume=true")) == 0
    pattern = "checkpoints/step_00000004/**/*.safetensors"
    one, other = files(whole, pattern), files(tmp_path / "run", pattern)
    assert any("/ema/" in name for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = [read_metrics(run / "metrics.jsonl") for run in (whole, tmp_path / "run")]
    assert [row.get("ema/decay") for row in found[0]] == [row.get("ema/decay") for row in found[1]]
    assert rows(whole, "eval") == rows(tmp_path / "run", "eval")


@pytest.mark.long
def test_the_plan_counts_four_bytes_a_trained_weight() -> None:
    settings = [*LORA, "pairs_per_step=1", "objective.timesteps_per_pair=1", "rollout.steps=1"]
    plain, found = (trace_step(load_config(None, [*settings, *more]), on_gpu=False) for more in ([], [EMA]))
    moments = plain.peak("optimizer")["optimizer"]
    count = found.peak("optimizer")["ema"]
    matrices = 2 * 30  # A and B of each layer; AdamW's counters take a block of 512 bytes each
    assert 2 * count + 512 * matrices == moments
    for name in ("rollout", "update", "refresh"):
        assert found.peak(name)["ema"] == count
        assert "ema" not in plain.peak(name)
    on_host = trace_step(load_config(None, [*settings, EMA, "ema.on_host=true"]), on_gpu=True)
    assert "ema" not in on_host.peak("optimizer")
    assert any("of host memory (ema.on_host)" in note for note in on_host.notes)


@pytest.mark.parametrize("decay", ["0", "1", "-0.5", "nan"])
def test_a_decay_outside_of_zero_and_one_is_refused(decay: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([f"ema.decay={decay}"]) == 1
    message = capsys.readouterr().err
    assert "ema.decay" in message
    assert message.count("\n") == 1
