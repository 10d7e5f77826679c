"""The reference of settings: complete, up to date in its three forms, and printed by train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpo_engine import settings, train
from vpo_engine.config import Config
from vpo_engine.config_file import load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
REMEDY = "run python -m vpo_engine.settings --write"


def test_the_written_reference_is_that_of_the_code() -> None:
    assert settings.REFERENCE.read_text(encoding="utf-8") == settings.markdown(), REMEDY


def test_the_written_schema_is_that_of_the_code() -> None:
    assert settings.SCHEMA.read_text(encoding="utf-8") == settings.schema(), REMEDY


def test_every_setting_and_section_is_explained() -> None:
    for group in settings.groups():
        assert group.meaning.endswith("."), group.key
        for setting in group.settings:
            assert setting.meaning.endswith("."), f"{group.key}.{setting.name} has no description below it"


def test_the_reference_has_every_setting_once() -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
        nested = [
            leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [prefix + k] for k, v in values.items()
        ]
        return [name for names in nested for name in names]

    listed = [
        f"{group.key}.{each.name}".lstrip(".") for group in settings.groups() for each in group.settings
    ]
    assert len(listed) == len(set(listed))
    assert set(leaves(Config().model_dump())) <= set(listed)
    assert {"rollout.prune.keep", "rollout.explore.steps", "guards.reward.kind", "model.lora.rank"} <= set(
        listed
    )


def test_type_default_and_source_of_a_setting() -> None:
    (rows,) = (
        {setting.name: setting for setting in group.settings}
        for group in settings.groups()
        if group.key == "reference"
    )
    refresh = rows["refresh_every"]
    assert (refresh.type, refresh.default) == ("integer, at least 1 or null", "200")
    assert refresh.source == "paper, section 4.1"
    assert "null: never." in refresh.meaning
    assert rows["storage"].type == "copy, bf16, int8, exact8, adapter"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_name_the_schema_and_keep_to_it(path: Path) -> None:
    assert "# yaml-language-server: $schema=schema.json\n" in path.read_text(encoding="utf-8")
    schema = json.loads(settings.SCHEMA.read_text(encoding="utf-8"))

    def check(values: dict[str, Any], described: dict[str, Any], where: str) -> None:
        described = next((kind for kind in described.get("anyOf", ()) if "$ref" in kind), described)
        described = (
            schema["$defs"][described["$ref"].rsplit("/", 1)[-1]] if "$ref" in described else described
        )
        assert described["additionalProperties"] is False, where
        for name, value in values.items():
            assert name in described["properties"], f"{where}{name}"
            if isinstance(value, dict):
                check(value, described["properties"][name], f"{where}{name}.")

    check(yaml.safe_load(path.read_text(encoding="utf-8")), schema, "")
    load_config(path)


def test_help_prints_all_settings_or_those_of_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help", "settings"]) == 0
    everything = capsys.readouterr().out
    assert "memory.preset=null" in everything
    assert "rollout.prune.keep=required" in everything
    assert train.main(["--help", "settings", "rollout"]) == 0
    out = capsys.readouterr().out
    assert "rollout.candidates=4   (integer, at least 2)\n    N: number of candidates per prompt." in out
    assert "rollout.prune.keep=" in out
    assert "memory." not in out.replace("memory.offload_idle", "")
    assert settings.main(["rolout"]) == 1
    assert "there is no section rolout; the sections are: model, model.lora, " in capsys.readouterr().err


def test_every_row_of_the_reference_has_five_cells() -> None:
    rows = [line for line in settings.markdown().splitlines() if line.startswith("| `")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {7}
