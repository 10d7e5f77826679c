"""Configurations of strangers: YAML files and settings of the command line, at every command that takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from command_line import call
from fuzz_driver import flip, fuzz
from hypothesis import strategies as st

from vpo_engine import check_model, evaluate, export, plan, reproduce, sample, train
from vpo_engine.config import Config
from vpo_engine.config.errors import known_keys
from vpo_engine.config_file import dump_config, load_config

KEYS = sorted(key for key, _ in known_keys(Config) if not key.startswith(("log.wandb", "run_dir")))
VALID = dump_config(load_config(None)).encode()
ODD = st.sampled_from(
    ["", "null", "true", "-1", "0", "1e999", ".nan", ".inf", "9" * 400, "0x10", "2024-01-01", "a: b", "[", "{", "'",
     '"', "[1, 2]", "{a: 1}", "auto", "../x", "/dev/zero", "/nowhere/" + "x" * 300, "~nobody/x", "$HOME/x", "\x1b[2J",
     "os:path", "json:JSONDecoder", "nothing.here:Thing", ":", "a:b:c", "[" * 50, "*a", "&a b",
     "!!python/name:os.system",
     "\u2028", "é", "\udcff"]
)  # fmt: skip
VALUES = ODD | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
NESTED = st.recursive(
    ODD | st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture
def nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``train`` end where it would import torch."""
    module: Any = ModuleType("vpo_engine.training")
    module.run_training = lambda config: 0
    monkeypatch.setitem(sys.modules, "vpo_engine.training", module)


def write_nested(path: Path, values: dict[str, Any]) -> None:
    """Write settings whose keys may have dots as nested YAML."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        place = nested
        *parents, leaf = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                break
        else:
            place[leaf] = value
    path.write_bytes(yaml.safe_dump(nested, allow_unicode=True).encode(errors="surrogatepass"))


@fuzz(values=st.dictionaries(st.sampled_from(KEYS), NESTED, min_size=1, max_size=4))
def test_settings_of_a_file(folder: Path, nothing_trains: None, values: dict[str, Any]) -> None:
    write_nested(folder / "c.yaml", values)
    call(train.main, [str(folder / "c.yaml"), f"run_dir={folder / 'run'}"])


@fuzz(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))
)
def test_files_that_are_no_yaml(folder: Path, nothing_trains: None, content: bytes) -> None:
    (folder / "c.yaml").write_bytes(content)
    call(train.main, [str(folder / "c.yaml"), f"run_dir={folder / 'run'}"])


@fuzz(places=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_yaml(folder: Path, nothing_trains: None, places: list[tuple[int, int]]) -> None:
    (folder / "c.yaml").write_bytes(flip(VALID, places))
    call(train.main, [str(folder / "c.yaml"), f"run_dir={folder / 'run'}", "log.wandb=null"])


WORDS = st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=8), VALUES)


@fuzz(words=st.lists(WORDS, min_size=1, max_size=4))
def test_settings_of_the_command_line(folder: Path, nothing_trains: None, words: list[str]) -> None:
    call(train.main, [*(word for word in words if "wandb" not in word), f"run_dir={folder / 'run'}"])


GONE = "/nowhere/run"
COMMANDS = {
    "plan": (plan.main, ["--gpu", "no-such-gpu"]),
    "sample": (sample.main, [GONE]),
    "evaluate": (evaluate.main, [GONE, "--samples", "1"]),
    "export": (export.main, [GONE, "--out"]),
    "check_model": (check_model.main, [GONE]),
    "reproduce": (reproduce.main, ["table99"]),
}
"""Commands with words that end them once everything else has been looked at, so that nothing heavy begins."""


@fuzz(name=st.sampled_from(sorted(COMMANDS)), words=st.lists(WORDS | VALUES, min_size=1, max_size=3))
def test_words_of_the_other_commands(folder: Path, name: str, words: list[str]) -> None:
    main, end = COMMANDS[name]
    out = [str(folder / "out")] if name == "export" else []
    assert call(main, [*end, *out, *words]).code != 0
