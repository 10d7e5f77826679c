"""The comparison of divisions: the GPU that is here, presets, the command that is recommended."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vpo_engine import plan
from vpo_engine.command import split_words
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.traffic import Exchanged, step_transfers
from vpo_engine.planning import planner, strategies
from vpo_engine.planning.estimate import PhasePlan, Plan
from vpo_engine.planning.exchanged import division
from vpo_engine.planning.gpus import GIB, GPUS, present_gpu
from vpo_engine.planning.links import make_cluster
from vpo_engine.planning.planner import plan_run
from vpo_engine.planning.trace import Trace, trace_step
from vpo_engine.planning.tracker import Tracker

A100 = GPUS["a100-80g"]


def plan_of(gib: float) -> Plan:
    return Plan((PhasePlan("update", {"weights": int(gib * GIB)}, 0, 0.0, 1.0),), 2 * GIB, "a test", A100, ())


def test_the_recommended_command_runs_what_is_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does so also where the configuration divides the run in another way."""
    monkeypatch.setattr(strategies, "plan_run", lambda *_: plan_of(1))
    monkeypatch.setattr(strategies, "exchanged", lambda _: Exchanged(trained=10**9, weight_bytes=4))
    file = tmp_path / "mine.yaml"
    file.write_text("distributed:\n  engine: deepspeed\n  zero_stage: 3\n")
    assert plan.main([str(file), "processes.per_prompt=2", "--gpus", "8", "--gpu", "a100-80g"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("recommended: data parallel, own prompts: ") for line in lines)
    words = shlex.split(lines[-1])
    config = load_config(*split_words(words[words.index("vpo_engine.train") + 1 :]))
    assert (config.distributed.engine, config.distributed.zero_stage) == ("data_parallel", None)
    assert config.processes.per_prompt == 1


def test_links_are_those_of_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here, seen = replace(GPUS["rtx4090"], name="NVIDIA GeForce RTX 4090"), []
    monkeypatch.setattr("vpo_engine.planning.gpus.present_gpu", lambda: here)
    monkeypatch.setattr(
        "vpo_engine.planning.answer.print_comparison",
        lambda config, gpu, cluster, **_: seen.append((gpu, cluster.within.name, cluster.between.name)),
    )
    assert plan.main(["--gpus", "2"]) == 0
    assert seen == [(here, "pcie4", "100gbe")]


@pytest.mark.parametrize(
    ("name", "kind"), [("NVIDIA A100-SXM4-40GB", "a100-40g"), ("NVIDIA A100-SXM4-80GB", "a100-80g")]
)
def test_a_device_has_the_bandwidth_of_its_kind(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name=name, total_memory=GPUS[kind].capacity)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = present_gpu()
    assert found is not None
    assert (found.capacity, found.bandwidth) == (GPUS[kind].capacity, GPUS[kind].bandwidth)


def test_a_preset_is_resolved_for_the_processes_of_each_division(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(config: Config, gpu: object, processes: int = 1) -> Plan:
        return plan_of(1 if config.memory.offload_idle else 8 / processes)

    for place in ("answer", "planner", "strategies"):
        monkeypatch.setattr(f"vpo_engine.planning.{place}.plan_run", planned)
    monkeypatch.setattr(strategies, "exchanged", lambda _: Exchanged(trained=1, weight_bytes=4))
    words = ["memory.preset=balanced", "--gpus", "8", "--gpu", "a100-80g"]
    assert plan.main(words) == 0
    assert "memory.preset=balanced (step 0 of " in capsys.readouterr().out
    assert plan.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not [reason for reason in found["left_out"].values() if "memory.offload_idle" in reason]
    assert any(row["name"].startswith("ZeRO") for row in found["strategies"])


def test_a_planned_step_does_everything_as_often_as_it_is_set() -> None:
    words = ["pairs_per_step=2", "rollout.candidates=2", "rollout.steps=1", "objective.timesteps_per_pair=2"]
    once, thrice, parts = (
        trace_step(load_config(None, [*words, more]), on_gpu=False, depth=1, network_only=True)
        for more in ("steps=9", "objective.updates_per_rollout=3", "objective.micro_batch_size=1")
    )
    assert thrice.flops("update") == pytest.approx(3 * once.flops("update"))
    for name in ("optimizer", "refresh"):
        assert thrice.traffic(name) == pytest.approx(3 * once.traffic(name)), name
        assert once.traffic(name) > 0
    assert parts.flops("update") == pytest.approx(once.flops("update"), rel=0.01)


def test_what_is_traced_has_the_held_out_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(planner, "traced", lambda config, **_: asked.append(config) or Trace(Tracker()))
    words = [
        "guards.reward.kind=hpsv2",
        "guards.reward.path=absent",
        "ema.decay=0.25",
        "rollout.batch_size=3",
    ]
    config = load_config(None, words)
    plan_run(config, A100)
    assert [(one.guards.reward, one.ema) for one in asked] == [(config.guards.reward, config.ema)]


def test_each_division_exchanges_what_its_own_preset_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(config: Config, gpu: object, processes: int = 1) -> Plan:
        fits = config.memory.weights == "fp32_master" or config.distributed.zero_stage == 3
        return plan_of(1 if fits else 8)

    def sizes(config: Config) -> Exchanged:
        return Exchanged(trained=10**9, weight_bytes=2 if config.memory.weights == "fp32_master" else 4)

    monkeypatch.setattr(strategies, "plan_run", planned)
    monkeypatch.setattr(strategies, "exchanged", sizes)
    config = load_config(None, ["memory.preset=balanced", "model.dtype=bfloat16"])
    rows, _ = strategies.compare(config, A100, make_cluster(8, 1, "a100-80g", None, None))
    assert {row.config.distributed.zero_stage for row in rows} >= {1, 3}
    for row in rows:
        assert row.sends == step_transfers(sizes(row.config), division(row.config, row.processes)), (
            row.strategy
        )
