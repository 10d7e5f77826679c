"""Configurations as files: one YAML per run, ``key.path=value`` overrides, errors that name the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vpo_engine.config import Config

SPRITES = "sprites.yaml"
_SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
"""Where the shipped configurations are: inside an installed package, or beside it in a checkout."""


def load_config(source: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (None: the sprites world) with ``key.path=value`` overrides.

    A name that is no file is looked up among the shipped configurations. ValueError names the file or
    argument, the key, the constraint and, for an unknown key, the nearest known one.
    """
    path = _shipped(SPRITES) if source is None else _find(Path(source))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, which ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _find(source: Path) -> Path:
    return source if source.is_file() else _shipped(source.name, source)


def _shipped(name: str, asked: Path | None = None) -> Path:
    for folder in _SHIPPED:
        if (folder / name).is_file():
            return folder / name
    known = sorted({path.name for folder in _SHIPPED for path in folder.glob("*.yaml")})
    raise ValueError(f"no configuration file {asked or name}; shipped ones: {', '.join(known) or 'none'}")


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"expected key.path=value, got {override!r}")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{override!r}: {parent} is a value, not a group of settings")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from error
    values[leaf] = value


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(dict(item)) for item in error.errors())


def _explain_one(item: dict[str, Any]) -> str:
    location = tuple(str(part) for part in item["loc"])
    key = ".".join(location) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(location)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not location or isinstance(item["input"], dict):
        return f"{key}: {message}" if location else message
    return f"{key}={item['input']!r}: {message}"


def _nearest(location: tuple[str, ...]) -> str:
    known = dict(_leaves(Config))
    wanted = ".".join(location)
    found = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    if not found:
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
        match = difflib.get_close_matches(location[-1], by_leaf, n=1, cutoff=0.5)
        found = [by_leaf[name] for name in match]
    return f"; did you mean {found[0]}?" if found else f"; known keys: {', '.join(Config.model_fields)}"


def _leaves(section: type[BaseModel], prefix: str = "") -> list[tuple[str, type]]:
    names: list[tuple[str, type]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names.append((prefix + name, kind))
            names.extend(_leaves(kind, f"{prefix}{name}."))
        else:
            names.append((prefix + name, object))
    return names
