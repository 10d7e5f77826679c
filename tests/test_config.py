"""The configuration: closed to unknown keys, round-tripping, with errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from vpo_kernels import attention, fused_ops

from vpo_engine.config import Config
from vpo_engine.config.model import KNOWN_MODELS, AttentionName, FusedOpsBackend
from vpo_engine.config.notes import notes
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.models.registry import BUILT_IN

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
        ("objective.betta=3", "argument: unknown key objective.betta; did you mean objective.beta?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("rolout.candidates=4", "unknown key rolout; did you mean rollout?"),
        ("rollout.candidates=1", "argument rollout.candidates=1 must be at least 2"),
        ("reference.refresh_every=0", "argument reference.refresh_every=0 must be at least 1"),
        ("objective.beta=-5", "objective.beta=-5 must be above 0"),
        ("objective.beta=.inf", "objective.beta=.inf must be a finite number"),
        ("reward.kind=videoscore", "reward.kind=videoscore needs reward.path, a local folder"),
        ("reward.kind=hpsv2_1", "reward.kind=hpsv2_1 needs reward.path, a local folder"),
        ("reward.frame_decay=0.5", "frame_decay=0.5 weighs segments, but frame_reduce=mean"),
        (
            "reward.kind=pikscore",
            "argument reward.kind=pikscore: there is no such reward; did you mean pickscore?",
        ),
        (
            "model.kind=sprits",
            "argument model.kind=sprits: there is no such model family; did you mean sprites?",
        ),
        (
            "model.device=gpu",
            "argument model.device=gpu: must be auto, cpu, cuda, or cuda:N for one of several GPUs; did",
        ),
        ("reward.device=tpu", "argument reward.device=tpu: must be auto, cpu, cuda"),
        (
            "memory.weights=fp32",
            "must be one of float32, fp32_master, stochastic_rounding; did you mean fp32_master?",
        ),
        ("memory.optimizer_bits=16", "argument memory.optimizer_bits=16 must be 32 or 8"),
        ("memory.sequential=maybe", "argument memory.sequential=maybe must be true or false"),
        (
            "rollout.batch_size=many",
            "argument rollout.batch_size=many must be auto or must be a whole number",
        ),
        ("rollout.guidance_interval=[0.5]", "argument rollout.guidance_interval=[0.5] must have 2 values"),
        ("rollout.prune.keep=2", "argument rollout.prune.after is missing; give it a value"),
        ("objective=3", "objective=3 is one value, but objective is a group of settings"),
        ("guards.reward.kind=hpsv2", "guards.reward.kind=hpsv2 needs guards.reward.path"),
        (
            "reward.path=weights",
            "reward.path=weights has no meaning for reward.kind=sprites, whose weights are in the",
        ),
        (
            "model.resolution=720p",
            "model.resolution=720p has no meaning for model.kind=sprites, whose clips have 17",
        ),
        ("steps=60:00", "argument steps=60:00 must be a whole number"),
        ("steps=true", "argument steps=true must be a whole number"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9, 1]: both must be at least 0 and below 1"),
        ("name=/", "argument name=/ must have a letter or a digit"),
        ("optimizer.lr=1,5", "argument optimizer.lr=1,5 must be a number"),
        (
            "steps=[4",
            "the value begins with [, so it is read as YAML, but this is not valid YAML: expected ',' or ']'",
        ),
        (
            "prompts.train=$NOWHERE/p.txt",
            "prompts.train=$NOWHERE/p.txt: $NOWHERE is not replaced in settings",
        ),
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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=001", "001"),
        ("name=1e5", "1e5"),
        ("name=yes", "yes"),
        ("name=a # b", "a # b"),
        ("name='quoted'", "quoted"),
        ("run_dir=2024-11-23", Path("2024-11-23")),
        ("run_dir=12:30", Path("12:30")),
        ("run_dir=~/runs/a", Path.home() / "runs/a"),
        ("prompts.train=data #2.txt", Path("data #2.txt")),
        ("prompts.train=a: b.txt", Path("a: b.txt")),
        ("prompts.column=null", None),
        ("model.dtype=float32", "float32"),
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr=.5", 0.5),
        ("steps=010", 10),
        ("memory.overcommit=yes", True),
        ("memory.overcommit=False", False),
        ("reward.dimensions=global", ("global",)),
        ("reward.dimensions={global: 2}", {"global": 2.0}),
    ],
)
def test_a_value_is_what_was_written_in_an_argument_and_in_a_file(
    override: str, value: object, tmp_path: Path
) -> None:
    keys, text = override.split("=", 1)
    file = tmp_path / "a.yaml"
    *sections, leaf = keys.split(".")
    text = f'"{text}"' if "#" in text or (": " in text and "{" not in text) else text
    file.write_text("".join(f"{section}:\n  " for section in sections) + f"{leaf}: {text}\n")
    for config in (load_config(None, [override]), load_config(file)):
        for key in keys.split("."):
            config = getattr(config, key)
        assert config == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "objective:\n  beta: 4\nsteps: 3\nobjective:\n  lr: 1\n",
            "objective is given twice, in lines 1 and 4",
        ),
        ("objective:\n  beta: 4\n  beta: 5\n", "objective.beta is given twice, in lines 2 and 3"),
        ("steps: 3\nobjective:\n  beta: -1\n", "a.yaml:3: objective.beta=-1 must be above 0"),
        ("steps: 3\nobjective:\n", "a.yaml:2: objective is empty, but objective is a group of settings"),
        ("steps: 3\nobjetive:\n  beta: 1\n", "a.yaml:2: unknown key objetive; did you mean objective?"),
        ("name: !!python/object:os.system x\n", "a.yaml:1: name has the tag tag:yaml.org,2002:python/object"),
        ("model: &m\n  lora: *m\n", "model.lora contains itself"),
        ("steps: [", "a.yaml:1: this is not valid YAML"),
        ("- 1", "must hold settings as 'key: value', found a list"),
        ("memory:\n  step_in_backward: true\n", "excludes optimizer.clip"),
    ],
)
def test_a_file_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(file)


def test_a_conflict_says_where_each_of_its_settings_was_given(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("reward:\n  kind: hpsv2\n  path: weights\n")
    with pytest.raises(ValueError, match=rf"\(reward.kind: argument, reward.path: {file}:3\)"):
        load_config(file, ["reward.kind=builtin"])


def test_anchors_and_merged_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("evaluation: &all\n  every: 7\ncheckpoint:\n  <<: *all\n  keep: 3\n")
    config = load_config(file)
    assert (config.evaluation.every, config.checkpoint.every, config.checkpoint.keep) == (7, 7, 3)


def test_only_a_bare_name_means_a_shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("sprites") == load_config("sprites.yaml") == load_config(None)
    for missing in ("epx/sprites.yaml", "./gone/sprites.yaml", str(tmp_path / "sprites.yaml")):
        with pytest.raises(
            ValueError, match=f"there is no configuration file {re.escape(str(Path(missing)))}; check"
        ):
            load_config(missing)
    with pytest.raises(
        ValueError, match=r"no configuration file sprite\.yaml; did you mean sprites\? Shipped"
    ):
        load_config("sprite.yaml")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs is a folder, not a configuration file"):
        load_config("runs")


def test_what_a_valid_configuration_does_unexpectedly_is_noted() -> None:
    assert notes(load_config(None)) == []
    (short,) = notes(load_config(None, ["steps=4"]))
    assert "optimizer.warmup_steps=5 is not below the 4 optimizer steps of" in short
    (single,) = notes(load_config(None, ["steps=1"]))
    assert "optimizer.warmup_steps=5 is not below the 1 optimizer step of" in single
    (single,) = notes(load_config(None, ["reference.refresh_every=1"]))
    assert "the margin is always 0" in single


def test_names_of_kinds_and_backends_are_those_of_their_owners() -> None:
    assert set(KNOWN_MODELS) == set(BUILT_IN)
    assert get_args(AttentionName) == get_args(attention.AttentionName)
    assert get_args(FusedOpsBackend) == get_args(fused_ops.BackendName)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"there is no configuration file absent\.yaml\. Shipped ones: .*opensora.*, sprites, ",
    ):
        load_config("absent.yaml")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["prompts.train=null"], "prompts.train"),
        (["prompts.held_out=null"], "prompts.held_out"),
        (["prompts.train=null", "prompts.held_out=null"], "prompts.train and prompts.held_out"),
    ],
)
def test_models_without_prompts_of_their_own_need_files(words: list[str], names: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(names)} must name a file; only the sprites world has"):
        load_config("opensora_v1_2_240p.yaml", words)


def test_stored_pairs_take_the_place_of_training_prompts() -> None:
    config = load_config("opensora_v1_2_240p.yaml", ["method=offline_dpo", "offline_dpo.dataset=runs/a"])
    assert config.prompts.train is None


def test_what_a_preset_sets_is_not_refused_where_a_method_does_not_use_it() -> None:
    assert load_config(None, ["method=refl", "memory.preset=lean"]).memory.sequential
    with pytest.raises(ValueError, match=r"memory\.sequential=true has no meaning for method=refl"):
        load_config(None, ["method=refl", "memory.sequential=true"])


def test_settings_of_the_file_that_the_method_leaves_out_are_named() -> None:
    (note,) = notes(load_config(None, ["method=refl"]))
    said, _, keys = note.partition(": ")
    assert said == "method=refl (ReFL) does not use these settings of the file, which are left out"
    assert {"rollout.candidates", "objective.beta", "reference.refresh_every"} <= set(keys.split(", "))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["rollout.prune.after=0.5", "rollout.prune.keep=2"],
            "rollout.prune={after: 0.5, keep: 2} has no meaning",
        ),
        (["rollout.explore.steps=6"], "rollout.explore={steps: 6} has no meaning"),
    ],
)
def test_a_group_that_the_method_does_not_use_is_refused_with_its_values(
    settings: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config(None, ["method=refl", *settings])


@pytest.mark.parametrize("setting", ["memory.step_in_backward=true", "memory.sequential=true"])
def test_a_preset_does_not_hide_what_a_method_does_not_use(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(setting)} has no meaning for method=refl"):
        load_config(None, ["method=refl", "memory.preset=fast", "optimizer.clip=null", setting])


@pytest.mark.parametrize(
    ("given", "said"),
    [("rollout={candidates: 8}", "rollout.candidates=8"), ("pairs={min_gap: 0.5}", "pairs.min_gap=0.5")],
)
def test_a_group_that_an_argument_gives_is_not_left_out(given: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(said)} has no meaning for method=refl"):
        load_config(None, ["method=refl", given])


def test_a_reference_that_is_always_the_policy_is_noted_of_stored_pairs_too() -> None:
    found = notes(load_config(None, ["method=offline_dpo", "offline_dpo.refresh_every=1"]))
    assert [note for note in found if "the margin is always 0" in note]


def test_teams_of_any_size_share_stored_pairs() -> None:
    words = ["method=offline_dpo", "offline_dpo.dataset=runs/a", "processes.per_prompt=3"]
    assert load_config(None, words).processes.per_prompt == 3
