"""Read and write configurations: one YAML file per run, ``key.path=value`` overrides, errors that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vpo_engine.config import Config
from vpo_engine.config.renamed import find_renamed

SPRITES = "sprites.yaml"
_SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
"""Folders of the shipped configurations: inside an installed package, or beside it in a checkout."""


def load_config(source: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file (None: the sprites world) with ``key.path=value`` overrides.

    A name that is no file is looked up among the shipped configurations. ValueError names the file or argument, the
    key, the constraint and, for an unknown key, the nearest known one. Settings with old names are all listed at once,
    with their new names.
    """
    path = _shipped(SPRITES) if source is None else _find(Path(source))
    text = _read(path)
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, found {type(values).__name__}")
    given = [_parse(override) for override in overrides]
    _refuse_old_names(path, text, values, given)
    for keys, value, override in given:
        _apply(values, keys, value, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, which ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _find(source: Path) -> Path:
    return source if source.is_file() else _shipped(source.name, source)


def _shipped(name: str, asked: Path | None = None) -> Path:
    for folder in _SHIPPED:
        if (folder / name).is_file():
            return folder / name
    known = sorted({path.name for folder in _SHIPPED for path in folder.glob("*.yaml")})
    raise ValueError(f"no configuration file {asked or name}; shipped ones: {', '.join(known) or 'none'}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _parse(override: str) -> tuple[list[str], Any, str]:
    """Return the keys and the value of ``key.path=value``, and the override itself."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"expected key.path=value, got {override!r}")
    try:
        return key.split("."), yaml.safe_load(text), override
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from error


def _apply(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    *parents, leaf = keys
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{override!r}: {parent} is a value, not a group of settings")
    values[leaf] = value


def _refuse_old_names(
    path: Path, text: str, values: dict[str, Any], given: Sequence[tuple[list[str], Any, str]]
) -> None:
    """Raise ValueError that lists every old key and old value in the file and in the overrides."""
    lines = dict(_line_numbers(yaml.compose(text, Loader=yaml.SafeLoader)))
    found = [f"{path}:{lines.get(old.key, '?')}: {old}" for old in find_renamed(values)]
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


def _line_numbers(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the dotted key and the line of every setting of a YAML file."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _line_numbers(value, f"{name}.")


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
