"""Old names of settings: every one of them is refused, with its new name, wherever it is given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vpo_engine import train
from vpo_engine.config import Config
from vpo_engine.config.errors import known_keys
from vpo_engine.config.renamed import KEYS, MOVED, VALUES
from vpo_engine.config_file import dump_config, load_config
from vpo_engine.runs.start import check_same_run


def test_every_new_name_is_a_setting_and_no_old_one_is() -> None:
    known = {key for key, _ in known_keys(Config)}
    assert set(KEYS.values()) <= known
    assert not set(KEYS) & known


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_an_old_key_as_an_override_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ValueError, match=rf"argument {re.escape(old)} is now {re.escape(new)}$"):
        load_config(None, [f"{old}=1"])


@pytest.mark.parametrize(
    ("key", "old", "new"), [(key, old, new) for key, values in VALUES.items() for old, new in values.items()]
)
def test_an_old_value_names_the_new_one_and_the_new_one_is_known(key: str, old: str, new: str) -> None:
    with pytest.raises(ValueError, match=rf"argument {re.escape(f'{key}={old} is now {key}={new}')}$"):
        load_config(None, [f"{key}={old}"])
    section, name = key.split(".")
    loaded = load_config(None, [f"{key}={new}"])
    assert getattr(getattr(loaded, section), name) == yaml.safe_load(new)


def test_training_on_a_dataset_is_a_method_now() -> None:
    for value in ("dataset", "ledger"):
        with pytest.raises(ValueError, match=rf"argument rollout.source={value} is now method=offline_dpo$"):
            load_config(None, [f"rollout.source={value}"])


def test_a_run_that_recorded_no_dataset_goes_on(tmp_path: Path) -> None:
    config = load_config(None)
    for key in ("dataset", "ledger"):
        old = dump_config(config).replace("\nrollout:\n", f"\nrollout:\n  {key}: null\n")
        assert f"  {key}: null" in old
        (tmp_path / "config.yaml").write_text(old)
        check_same_run(config, tmp_path / "config.yaml")
        (tmp_path / "config.yaml").write_text(old.replace(f"  {key}: null\n", f"  {key}: runs/x\n"))
        with pytest.raises(ValueError, match=f"rollout.{key} is now offline_dpo.dataset"):
            load_config(tmp_path / "config.yaml")


OLD = """name: earlier
memory:
  recompute: nothing
  weights: masters
  residency: phases
rollout: {rows: 4, candidates: 4}
objective:
  beta: 250.0
  draws: 4
"""


def test_a_file_with_old_names_lists_all_of_them_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    with pytest.raises(ValueError, match="have new names") as caught:
        load_config(path, ["pairs={refill: 2}", "reward.rows=1"])
    assert str(caught.value).splitlines()[1:] == [
        f"  {path}:3: memory.recompute=nothing is now memory.activation_checkpointing=none",
        f"  {path}:4: memory.weights=masters is now memory.weights=fp32_master",
        f"  {path}:5: memory.residency=phases is now memory.offload_idle=true",
        f"  {path}:6: rollout.rows is now rollout.batch_size",
        f"  {path}:9: objective.draws is now objective.timesteps_per_pair",
        "  argument pairs.refill is now pairs.resample",
        "  argument reward.rows is now reward.batch_size",
    ]


def test_a_run_that_was_written_with_old_names_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    check_same_run(config, tmp_path / "config.yaml")
    old = dump_config(config).replace("timesteps_per_pair:", "draws:")
    (tmp_path / "config.yaml").write_text(old)
    with pytest.raises(
        ValueError, match=r"config\.yaml:\d+: objective\.draws is now objective\.timesteps_per"
    ):
        check_same_run(config, tmp_path / "config.yaml")
    assert train.main([str(tmp_path / "config.yaml"), f"run_dir={tmp_path}", "checkpoint.resume=true"]) == 1
    assert "objective.draws is now objective.timesteps_per_pair" in capsys.readouterr().err


def test_the_glossary_lists_every_renamed_setting() -> None:
    glossary = (Path(__file__).parent.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", glossary, re.MULTILINE))
    for old, new in KEYS.items():
        assert {(old, new)} & rows or any(row[0].startswith(f"{old}=") for row in rows), old
    for key, values in VALUES.items():
        for old, new in values.items():
            assert any(row[0].endswith(f"={old}") and row[1] == f"{key}={new}" for row in rows), (
                f"{key}={old}"
            )
    moved = {("=".join(old), "=".join(new)) for old, new in MOVED.items()}
    assert moved <= rows
