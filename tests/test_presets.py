"""Presets: what each sets, that settings that are given win, and how balanced is chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vpo_engine import plan, train
from vpo_engine.config import Config
from vpo_engine.config.presets import MEMORY_STEPS
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.planning.planner import check_fits
from vpo_engine.planning.presets import resolve_presets

CONFIGS = Path(__file__).parent.parent / "configs"
LEAN = {
    "weights": "fp32_master",
    "activation_checkpointing": "block",
    "mlp_chunks": 4,
    "sequential": True,
    "offload_idle": True,
    "decode_frames": 2,
}


def never(_: Config) -> bool:
    pytest.fail("no plan is needed")


def without_presets(config: Config) -> dict[str, Any]:
    values = config.model_dump()
    for section in (values["memory"], values["rollout"]):
        del section["preset"]
    return values


def test_fast_and_exact_are_the_defaults() -> None:
    named = load_config(None, ["memory.preset=fast", "rollout.preset=exact"])
    assert without_presets(named) == without_presets(load_config(None))
    assert load_config(None).memory.preset is load_config(None).rollout.preset is None


def test_lean_sets_what_the_published_720p_configuration_has() -> None:
    lean = load_config(None, ["memory.preset=lean"]).memory.model_dump()
    assert {name: lean[name] for name in LEAN} == LEAN
    published = load_config(CONFIGS / "opensora_v1_2_720p.yaml").memory
    assert published.model_dump() == lean


@pytest.mark.parametrize(("guidance", "interval"), [(1.0, None), (7.0, (0.3, 1.0))])
def test_a_fast_rollout_has_a_cache_and_limits_guidance_where_there_is_any(
    guidance: float, interval: tuple[float, float] | None
) -> None:
    rollout = load_config(None, ["rollout.preset=fast", f"rollout.guidance={guidance}"]).rollout
    assert (rollout.cache, rollout.guidance_interval) == (0.1, interval)


def test_given_settings_win_also_over_the_file_and_when_they_are_defaults() -> None:
    config = load_config("opensora_v1_2_720p.yaml", ["memory.mlp_chunks=1", "memory.decode_frames=null"])
    assert (config.memory.mlp_chunks, config.memory.decode_frames) == (1, None)
    assert config.memory.weights == "fp32_master"
    assert load_config("sprites_fast.yaml", ["rollout.cache=null"]).rollout.cache is None
    said = resolve_presets(config, never)[1]
    assert said == (
        "memory.preset=lean sets weights=fp32_master activation_checkpointing=block sequential=true offload_idle=true; "
        "but mlp_chunks=1 decode_frames=null"
    )


def test_without_presets_nothing_changes_and_nothing_is_said() -> None:
    config = load_config(None)
    assert resolve_presets(config, never) == (config, "")


@pytest.mark.parametrize("number", range(len(MEMORY_STEPS)))
def test_balanced_is_the_first_step_that_fits_and_keeps_what_was_given(number: int) -> None:
    config = load_config(None, ["memory.preset=balanced", "memory.decode_frames=3", "reference.storage=int8"])
    asked: list[Config] = []

    def fits(changed: Config) -> bool:
        asked.append(changed)
        return len(asked) > number

    found, said = resolve_presets(config, fits)
    expected: dict[str, Any] = {}
    for step in MEMORY_STEPS[: number + 1]:
        expected |= step
    expected["decode_frames"] = 3
    assert {name: getattr(found.memory, name) for name in expected} == expected
    assert found.model_copy(update={"memory": config.memory}) == config
    assert f"(step {number} of {len(MEMORY_STEPS) - 1} from fast to lean)" in said
    assert len(asked) == min(number + 1, len(MEMORY_STEPS) - 1)


def test_the_last_step_of_balanced_is_lean() -> None:
    found, _ = resolve_presets(load_config(None, ["memory.preset=balanced"]), lambda _: False)
    assert {name: getattr(found.memory, name) for name in LEAN} == LEAN


def test_all_processes_take_the_step_of_the_first() -> None:
    config = load_config(None, ["memory.preset=balanced"])
    found, _ = resolve_presets(config, lambda _: True, agree=lambda _: "3")
    assert found.memory.activation_checkpointing == "block"


def test_balanced_leaves_out_what_another_setting_excludes() -> None:
    config = load_config(None, ["memory.preset=balanced", "rollout.overlap=true"])
    found, said = resolve_presets(config, lambda _: False)
    assert not found.memory.offload_idle
    assert found.memory.sequential
    assert said.endswith("; but offload_idle=false")


@pytest.mark.parametrize("number", [0, 3, len(MEMORY_STEPS) - 1])
def test_balanced_begins_with_weights_that_the_reference_takes(number: int) -> None:
    """An exact reference in 8 bits excludes the float32 weights of the first steps: lean's take their place."""
    config = load_config("opensora_v1_2_720p.yaml", ["memory.preset=balanced"])
    found, said = resolve_presets(
        config, lambda changed: changed.memory.weights == "fp32_master", lambda _: str(number)
    )
    assert (found.reference.storage, found.memory.weights) == ("exact8", "fp32_master")
    assert found.memory.activation_checkpointing == ("none" if number == 0 else "block")
    assert said.endswith("; but weights=fp32_master") == (number < len(MEMORY_STEPS) - 1)
    with pytest.raises(
        ValueError, match=r"exact8 keeps differences from bfloat16 weights, but memory.weights=float32"
    ):
        load_config("opensora_v1_2_720p.yaml", ["memory.preset=balanced", "memory.weights=float32"])


def test_a_resolved_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = load_config(None, ["memory.preset=balanced", "rollout.preset=fast"])
    found, _ = resolve_presets(config, lambda changed: changed.memory.sequential)
    (tmp_path / "config.yaml").write_text(dump_config(found))
    again, said = resolve_presets(load_config(tmp_path / "config.yaml"), never)
    assert again == found
    assert "memory.preset=balanced (every setting is given)" in said


@pytest.mark.long
def test_a_run_prints_and_saves_what_its_presets_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], smallest: list[str], small_policy: str
) -> None:
    run = tmp_path / "run"
    presets = ["memory.preset=balanced", "rollout.preset=fast", "checkpoint.every=null"]
    assert train.main([*smallest, small_policy, *presets, "steps=1", f"run_dir={run}"]) == 0
    out = capsys.readouterr().out
    assert "rollout.preset=fast sets cache=0.1\n" in out
    assert re.search(r"memory\.preset=balanced \(step \d of 6 from fast to lean\) sets weights=", out)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["rollout"]["preset"], saved["rollout"]["cache"]) == ("fast", 0.1)
    assert saved["memory"]["preset"] == "balanced"


@pytest.mark.long
def test_plan_prints_presets_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["rollout.preset=fast", "memory.preset=balanced"]
    _, said = check_fits(load_config(None, overrides), torch.device("cpu"))
    assert plan.main(overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == said.splitlines()[:2]
    assert plan.main([*overrides, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"] == lines[:2]
