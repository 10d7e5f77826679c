"""The configuration: closed to unknown keys, round-tripping, with errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vpo_engine.config import Config
from vpo_engine.config_file import dump_config, load_config

CONFIGS = Path(__file__).parent.parent / "configs"


def test_no_configuration_is_the_sprites_world() -> None:
    assert load_config(None) == load_config(CONFIGS / "sprites.yaml")
    assert load_config(None).model.kind == "sprites"


def test_paper_configuration_holds_the_papers_values() -> None:
    config = load_config(CONFIGS / "opensora_v1_2_240p.yaml")
    assert (config.rollout.candidates, config.rollout.steps, config.rollout.guidance) == (4, 30, 7.0)
    assert (config.reference.refresh_every, config.optimizer.lr, config.pairs_per_step) == (200, 1e-5, 8)
    assert (config.model.resolution, config.model.aspect, config.model.num_frames) == ("240p", "9:16", 34)
    assert config.reward.dimensions == ("temporal_consistency",)


def test_defaults_are_the_papers() -> None:
    paper = load_config(CONFIGS / "opensora_v1_2_240p.yaml")
    default = Config()
    assert default.rollout.model_dump(exclude={"batch_size"}) == paper.rollout.model_dump(
        exclude={"batch_size"}
    )
    assert default.optimizer == paper.optimizer
    assert default.reference == paper.reference
    assert default.pairs_per_step == paper.pairs_per_step


def test_a_shipped_configuration_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("sprites.yaml") == load_config(None)


def test_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["reward.dimensions=global", "optimizer.lr=3e-5", "run_dir=/somewhere"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_replace_and_scientific_notation_is_a_number() -> None:
    config = load_config(None, ["objective.beta=1e3", "checkpoint.every=null", "steps=7"])
    assert (config.objective.beta, config.checkpoint.every, config.steps) == (1000.0, None, 7)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("objective.betta=3", "unknown key objective.betta; did you mean objective.beta?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("rolout.candidates=4", "unknown key rolout; did you mean rollout?"),
        ("rollout.candidates=1", "rollout.candidates=1: Input should be greater than or equal to 2"),
        (
            "reference.refresh_every=0",
            "reference.refresh_every=0: Input should be greater than or equal to 1",
        ),
        ("objective.beta=-5", "objective.beta=-5: Input should be greater than 0"),
        ("objective.beta=.inf", "objective.beta=inf: Input should be a finite number"),
        ("reward.kind=videoscore", "kind videoscore needs reward.path, a local folder"),
        ("reward.kind=hpsv2_1", "kind hpsv2_1 needs reward.path, a local folder"),
        ("reward.frame_decay=0.5", "frame_decay=0.5 weighs segments, but frame_reduce=mean"),
        ("optimizer.warmup_steps=99", "optimizer.warmup_steps=99 must be below steps=40"),
        ("steps", "expected key.path=value, got 'steps'"),
        ("steps.more=1", "steps is a value, not a group of settings"),
    ],
)
def test_wrong_settings_name_key_constraint_and_remedy(override: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["reference.storage=exact8"], "keeps differences from bfloat16 weights, but memory.weights=float32"),
        (["reference.storage=adapter"], "reference.storage=adapter and model.lora=null do not go together"),
        (["model.lora.rank=4"], "reference.storage=copy and model.lora=set do not go together"),
        (
            ["memory.offload_activations=true"],
            "memory.activation_checkpointing=none keeps many times as much on the device",
        ),
        (["memory.step_in_backward=true"], "memory.step_in_backward=true excludes optimizer.clip"),
        (
            ["memory.step_in_backward=true", "optimizer.clip=null", "memory.sequential=true"],
            "excludes memory.sequential=true: a step needs the gradients of winner and loser; set false",
        ),
        (
            ["memory.step_in_backward=true", "optimizer.clip=null", "objective.micro_batch_size=4"],
            "excludes objective.micro_batch_size: a step needs the gradients of all pairs; set null",
        ),
    ],
)
def test_settings_that_exclude_each_other_say_why(overrides: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        load_config(None, overrides)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no configuration file absent\.yaml; shipped ones: .*sprites\.yaml"
    ):
        load_config("absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1")
    with pytest.raises(ValueError, match=r"must hold a mapping of settings, found list"):
        load_config(listed)
