"""Print what every setting does, or write the reference of all settings.

    python -m vpo_engine.settings [SECTION]     print all, or one section
    python -m vpo_engine.settings --write       for developers of the engine

Everything is taken from the types and docstrings of vpo_engine.config.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from vpo_engine.config import Config, Section
from vpo_engine.help_text import HelpFormatter
from vpo_engine.texts import say

ROOT = Path(__file__).parent.parent
REFERENCE, SCHEMA = ROOT / "docs" / "settings.md", ROOT / "configs" / "schema.json"

_HEAD = """# Settings

Every setting of a run, with its type and default. A run is configured by one YAML file, and `SECTION.KEY=VALUE` on the
command line replaces single settings. "Paper" is OnlineVPO, arXiv 2412.15159; a setting without a source has a
default of this project's own. `python -m vpo_engine.train --help settings` prints this page in a terminal, and
`configs/schema.json` lets editors complete and check configuration files. [glossary.md](glossary.md) lists the old
names of settings.

This page is made from the docstrings of `vpo_engine/config` by `python -m vpo_engine.settings --write`.
"""


@dataclass(frozen=True)
class Setting:
    """A setting as the reference shows it."""

    name: str
    type: str
    default: str
    meaning: str
    source: str


@dataclass(frozen=True)
class Group:
    """The settings of one section; ``key`` is "" for those of the run itself."""

    key: str
    meaning: str
    settings: tuple[Setting, ...]


def groups(section: type[Section] = Config, key: str = "") -> Iterator[Group]:
    """Yield the settings of a section, then those of the sections inside it, in the order of the code."""
    inside = {
        name: kind for name, field in section.fields_by_key().items() if (kind := _section(field)) is not None
    }
    listed = [
        name for name, field in section.fields_by_key().items() if name not in inside or field.default is None
    ]
    meaning = " ".join((section.__doc__ or "").split())
    yield Group(key, meaning, tuple(_setting(name, section.fields_by_key()[name]) for name in listed))
    for name, kind in inside.items():
        yield from groups(kind, f"{key}.{name}" if key else name)


def _section(field: FieldInfo) -> type[Section] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _setting(name: str, field: FieldInfo) -> Setting:
    meaning, _, source = " ".join((field.description or "").split()).partition(" Source: ")
    default = "required" if field.is_required() else _value(field.default)
    kind, null, _ = _type(field.annotation).partition(" or null")
    kind += "".join(_bound(item) for item in field.metadata)
    return Setting(name, kind + null, default, meaning, source.removesuffix("."))


def _value(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Path | str):
        return str(value)
    return json.dumps(value)


def _type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is NoneType:
        return "null"
    if origin is Literal:
        return ", ".join(map(_value, arguments))
    if origin is Annotated:
        return _type(arguments[0]) + "".join(
            _bound(item) for field in arguments[1:] for item in getattr(field, "metadata", ())
        )
    if origin in (Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is tuple:
        number = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {number}{_plural(arguments[0])}"
    if origin is dict:
        return f"mapping of {_plural(arguments[0])} to {_plural(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "group"
    return {int: "integer", float: "number", bool: "true, false", str: "text", Path: "path"}[kind]


def _plural(kind: Any) -> str:
    return {int: "integers", float: "numbers", str: "names"}[kind]


def _bound(item: Any) -> str:
    signs = {
        annotated_types.Ge: ("ge", "at least"),
        annotated_types.Gt: ("gt", "above"),
        annotated_types.Le: ("le", "at most"),
        annotated_types.Lt: ("lt", "below"),
    }
    attribute, words = signs.get(type(item), ("", ""))
    return f", {words} {getattr(item, attribute):g}" if words else ""


def markdown() -> str:
    """Return the whole reference as the text of docs/settings.md."""
    parts = [_HEAD]
    for group in groups():
        parts.append(f"\n## {group.key or 'The run'}\n\n{group.meaning}\n")
        parts.append("\n| key | type | default | meaning | source |\n|---|---|---|---|---|\n")
        for setting in group.settings:
            key = f"{group.key}.{setting.name}" if group.key else setting.name
            cells = (
                f"`{key}`",
                setting.type,
                f"`{setting.default}`",
                setting.meaning.replace("|", r"\|"),
                setting.source,
            )
            parts.append(f"| {' | '.join(cells)} |\n".replace("``", "`").replace("|  |", "| |"))
    return "".join(parts)


def terminal(section: str | None = None) -> str:
    """Return the reference for a terminal: of ``section`` and the sections inside it, or of everything (None).

    ValueError names the sections if there is no such one.
    """
    found = [group for group in groups() if section is None or f"{group.key}.".startswith(f"{section}.")]
    if not found:
        known = ", ".join(group.key for group in groups() if group.key)
        raise ValueError(f"there is no section {section}; the sections are: {known}")
    return "\n".join(line for group in found for line in _lines(group))


def _lines(group: Group) -> Iterator[str]:
    yield from textwrap.wrap(f"{group.key or 'the run'}: {group.meaning}", 100)
    for setting in group.settings:
        name = f"{group.key}.{setting.name}" if group.key else setting.name
        yield f"\n  {name}={setting.default}   ({setting.type})"
        source = f" Source: {setting.source}." if setting.source else ""
        yield from textwrap.wrap(
            setting.meaning + source, 96, initial_indent="    ", subsequent_indent="    "
        )
    yield ""


def schema() -> str:
    """Return the JSON schema of configuration files as the text of configs/schema.json."""
    described = Config.model_json_schema()
    return (
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **described}, indent=1) + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vpo_engine.settings",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("section", nargs="?", help="such as rollout or rollout.prune; default: all")
    parser.add_argument("--write", action="store_true", help="write docs/settings.md and configs/schema.json")
    given = parser.parse_args(arguments)
    if given.write:
        if not REFERENCE.parent.is_dir():
            print(
                f"error: {ROOT} is no checkout of the project: it has no folder docs",
                file=sys.stderr,
                flush=True,
            )
            return 1
        for path, text in ((REFERENCE, markdown()), (SCHEMA, schema())):
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
        return 0
    try:
        print(terminal(given.section))
    except ValueError as error:
        say(f"error: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
