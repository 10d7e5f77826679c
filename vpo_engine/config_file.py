"""Read and write configurations: one YAML file per run, ``key.path=value`` overrides, errors that say what to do."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vpo_engine.config import Config
from vpo_engine.config.errors import ARGUMENT, explain, nearest
from vpo_engine.config.methods import GIVEN, METHODS, card_of, drop_settings
from vpo_engine.config.renamed import drop_empty, find_renamed
from vpo_engine.config.yaml_values import MOST_BYTES, Settings, read_override, read_settings
from vpo_engine.texts import read_text, shortened, why_no_file

SPRITES = "sprites.yaml"
_OF_MODEL = (
    ("model.policy", "folder or weights file"),
    ("model.vae", "folder"),
    ("model.text_encoder", "folder"),
)
"""Settings that name what must be there before a model is loaded."""
_OF_RUN = (
    *_OF_MODEL,
    ("offline_dpo.dataset", "folder"),
    ("prompts.train", "file"),
    ("prompts.held_out", "file"),
    ("distributed.deepspeed_config", "file"),
    ("offline_dpo.file", "file"),
)
"""Settings that name what must be there when a run begins. Rewards say themselves what they read."""
_SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
"""Folders of the shipped configurations: inside an installed package, or beside it in a checkout."""


def load_config(source: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file (None: the sprites world) with ``key.path=value`` overrides.

    A bare name that is no file here, with or without .yaml, is looked up among the shipped configurations. The last of
    several overrides of a setting counts. ValueError names the file and line or the argument, the key, the constraint
    and, for an unknown key or value, the nearest known one. Settings with old names are all listed at once, with their
    new names.
    """
    path = _shipped(SPRITES) if source is None else _find(Path(source))
    return parse_config(_read(path), str(path), overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML text with overrides; ``source`` is how errors call the text."""
    settings = read_settings(text, source, Config)
    drop_empty(settings.values)
    given = [(*read_override(override, Config), override) for override in overrides]
    _refuse_old_names(settings, given)
    method = settings.values.get("method")
    for keys, value, override in given:
        _apply(settings, keys, value, override)
    left_out = _leave_out_unused(settings) if settings.values.get("method") != method else []
    try:
        return Config.model_validate(settings.values).with_left_out(left_out)
    except ValidationError as error:
        raise ValueError(explain(error, Config, settings.origins)) from None


def require_files(config: Config) -> None:
    """Raise ValueError, with the setting, for a file or folder of the configuration that does not exist."""
    _require(config, _OF_RUN)


def require_model_files(config: Config) -> None:
    """Raise ValueError, with the setting, for a file or folder of the model that does not exist."""
    _require(config, _OF_MODEL)


def _require(config: Config, settings: Sequence[tuple[str, str]]) -> None:
    for key, kind in settings:
        section, name = key.rsplit(".", 1)
        owner = config
        for part in section.split("."):
            owner = getattr(owner, part) if owner is not None else None
        path = getattr(owner, name, None)
        if path is None:
            continue
        if not os.path.exists(path):
            where = "" if os.path.isabs(path) else f" (relative to {os.getcwd()})"
            published = "; docs/tutorials says where models are published" if (key, kind) in _OF_MODEL else ""
            raise ValueError(
                f"{key}={shortened(str(path))}: there is no such {kind}; check the path{where}{published}"
            )
        if kind in ("folder", "file") and os.path.isdir(path) != (kind == "folder"):
            raise ValueError(f"{key}={path} must be a {kind}; check the path")
        if not os.path.isdir(path) and (reason := why_no_file(path, kind)):
            raise ValueError(f"{key}: {reason}")


def shipped_configurations() -> list[str]:
    """Return the names of the configurations that come with the engine, without ``.yaml``."""
    return sorted({path.stem for folder in _SHIPPED for path in folder.glob("*.yaml")})


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, which ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find(source: Path) -> Path:
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        raise ValueError(_folder_text(source))
    if os.path.lexists(source):
        raise ValueError(why_no_file(source, "configuration file"))
    if source.name == str(source):
        return _shipped(source.name)
    raise ValueError(f"there is no configuration file {shortened(str(source))}; check the path")


def _folder_text(folder: Path) -> str:
    if (folder / "config.yaml").is_file():
        config, root = shlex.quote(str(folder / "config.yaml")), shlex.quote(str(folder))
        return (
            f"{folder} is a run directory, not a configuration file; to go on with that run give\n"
            f"  {config} run_dir={root} checkpoint.resume=true"
        )
    return f"{folder} is a folder, not a configuration file; give the path of a .yaml file"


def _shipped(name: str) -> Path:
    for folder in _SHIPPED:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if os.path.isfile(candidate):
                return candidate
    known = shipped_configurations()
    hint = nearest(name.removesuffix(".yaml"), known) or "."
    raise ValueError(
        f"there is no configuration file {shortened(name)}{hint} Shipped ones: {', '.join(known) or 'none'}"
    )


def _read(path: Path) -> str:
    return read_text(path, "configuration file", MOST_BYTES)


def _apply(settings: Settings, keys: Sequence[str], value: Any, override: str) -> None:
    values = settings.values
    *parents, leaf = keys
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"{override!r}: {parent} is a value, not a group of settings")
    values[leaf] = value
    key = ".".join(keys)
    for name in [name for name in settings.origins if name.startswith(f"{key}.")]:
        del settings.origins[name]
    settings.origins[key] = ARGUMENT


def _leave_out_unused(settings: Settings) -> list[str]:
    """Take out what the file says of settings that the method, which an argument names, does not use; return their
    keys. Arguments stay, and are refused."""
    method = settings.values["method"]
    if method not in METHODS:
        return []
    section = settings.values.get(method)

    def is_argument(key: str) -> bool:
        return any(
            place == ARGUMENT
            for name, place in settings.origins.items()
            if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")
        )

    given = section if isinstance(section, dict) else {}
    source = next((name for name in GIVEN if given.get(name) is not None), None)
    return drop_settings(settings.values, card_of(method, source).unused, is_argument)


def _refuse_old_names(settings: Settings, given: Sequence[tuple[list[str], Any, str]]) -> None:
    """Raise ValueError that lists every old key and old value in the file and in the overrides."""
    found = [f"{settings.origins.get(old.key, '?')}: {old}" for old in find_renamed(settings.values)]
    for keys, value, _ in given:
        nested = value
        for key in reversed(keys):
            nested = {key: nested}
        found += [f"argument {old}" for old in find_renamed(nested)]
    if found:
        raise ValueError(
            "these settings have new names (docs/glossary.md lists them all); replace them:\n  "
            + "\n  ".join(found)
        )
