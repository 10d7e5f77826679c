"""Read YAML without surprises: a setting that is text keeps its characters, and a key that stands twice is an error.

YAML 1.1, which most readers follow, turns 60:00 into 3600, 001 into 1, 2024-11-23 into a date and yes into true, and
lets the last of two equal keys win. Here the type of the setting decides how its value is read, and numbers are those
of YAML 1.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from vpo_engine.config.section import Section
from vpo_engine.texts import one_line, shortened

MOST_BYTES = 1 << 17
"""Bytes of the largest configuration file; those of people have a few thousand."""
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_KNOWN_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "map", "seq")
}
_MOST_DIGITS = 300
"""Digits of a whole number; what has more stays text, as a number that is too large for a float, and is refused."""
_MOST_VALUES = 20_000
"""Values of a configuration, counted as often as aliases repeat them."""
_DEEP = "lists and groups lie too deep inside one another; no setting is like that"
_BRACKETS, _DEEPEST = re.compile(r"[][{}]"), 20
_FASTEST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's parser in C, which takes a tenth of the time, where PyYAML was built with it."""
_PLAIN, _COMPACT = re.compile(r"[\n \"->@-~]*"), re.compile(r"(?:[-:] +){20}")
"""Text that both parsers read alike; and groups so deep inside one another in a line that the one in C might crash."""
_MERGE = "tag:yaml.org,2002:merge"


@dataclass
class Settings:
    """Settings as nested dictionaries, and where each of them stands."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """{dotted key: file and line, or the argument that gave it}."""


def read_settings(text: str, source: str, kind: type[Section]) -> Settings:
    """Return the settings of a YAML text, which are those of ``kind``; ``source`` is its file's name, for errors.

    Raise ValueError, with the line, for text that is not YAML, for a key that stands twice, and for tags.
    """
    try:
        root = _compose(text)
        if root is None:
            return Settings()
        if not isinstance(root, yaml.MappingNode):
            found = "a list" if isinstance(root, yaml.SequenceNode) else shortened(repr(root.value))
            raise ValueError(f"{source} must hold settings as 'key: value', found {found}")
        _refuse_expansion(root, source)
        reader = _Reader(source)
        return Settings(reader.mapping(root, kind, ""), reader.origins)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}{_explain(error)}") from error
    except RecursionError:
        raise ValueError(f"{source}: {_DEEP}") from None


def read_override(override: str, kind: type[Section]) -> tuple[list[str], Any]:
    """Return the keys and the value of ``key.path=value``.

    The value is read as it is, up to its last character. Only one that begins with a bracket, a brace or a quote is
    read as YAML.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"expected key.path=value, got {shortened(repr(override))}")
    keys, said = key.split("."), one_line(shortened(override))
    if text[:1] not in tuple("[{\"'"):
        plain = yaml.ScalarNode("tag:yaml.org,2002:str", text.strip(), style=None)
        return keys, _Reader(f"argument {said}", lines=False).value(plain, _annotation(kind, keys), key)
    try:
        node = _compose(text)
        assert node is not None
        _refuse_expansion(node, f"argument {said}")
        return keys, _Reader(f"argument {said}", lines=False).value(node, _annotation(kind, keys), key)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{said!r}: the value begins with {text[0]}, so it is read as YAML, but{_explain(error, False)}"
        ) from error
    except RecursionError:
        raise ValueError(f"argument {said}: {_DEEP}") from None


def _compose(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text. RecursionError for brackets so deep inside one another that it takes long."""
    depth = 0
    for bracket in _BRACKETS.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > _DEEPEST:
            raise RecursionError
    if _PLAIN.fullmatch(text) and not _COMPACT.search(text):
        with suppress(yaml.YAMLError):  # the parser in Python says more clearly what is wrong
            return yaml.compose(text, Loader=_FASTEST)
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _refuse_expansion(root: yaml.Node, source: str) -> None:
    """Raise ValueError if aliases make so many values of a short text that reading them would not end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # what contains itself is refused where it is read
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            sizes[id(node)] = 1 + sum(
                sum(map(size, part)) if isinstance(part, tuple) else size(part) for part in parts
            )
        return sizes[id(node)]

    if size(root) > _MOST_VALUES:
        raise ValueError(
            f"{source}: aliases (*name) repeat values until there are more than {_MOST_VALUES:,} of them; write the "
            "values out"
        )


class _Reader:
    """Makes values of YAML nodes, and notes the lines of their keys."""

    def __init__(self, source: str, lines: bool = True) -> None:
        self.origins: dict[str, str] = {}
        self._source, self._lines = source, lines
        self._open: set[int] = set()

    def mapping(self, node: yaml.MappingNode, kind: Any, prefix: str) -> dict[str, Any]:
        self._refuse_repeated(node, prefix)
        self._refuse_own_merge(node, prefix)
        yaml.SafeLoader("").flatten_mapping(node)
        values = {}
        for key, value in node.value:
            name = self._name(key)
            self.origins[prefix + name] = f"{self._source}:{key.start_mark.line + 1}"
            values[name] = self.value(value, _annotation(kind, [name]), prefix + name)
        return values

    def value(self, node: yaml.Node, kind: Any, key: str) -> Any:
        if node.tag not in _KNOWN_TAGS:
            raise ValueError(f"{self._place(node)}: {key} has the tag {node.tag}; give a plain value")
        if id(node) in self._open:
            raise ValueError(f"{self._place(node)}: {key} contains itself; write its value out")
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.style else _plain(node.value, kind)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, kind, f"{key}.")
            kinds = _element_kinds(kind, len(node.value))
            return [self.value(one, of, key) for one, of in zip(node.value, kinds, strict=True)]
        finally:
            self._open.discard(id(node))

    def _refuse_repeated(self, node: yaml.MappingNode, prefix: str) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            self._name(key)
            line = key.start_mark.line + 1
            if key.value in lines and key.tag != _MERGE:
                raise ValueError(
                    f"{self._source}: {prefix}{key.value} is given twice, in lines {lines[key.value]} and {line}; "
                    "keep one of them"
                )
            lines[key.value] = line

    def _refuse_own_merge(self, node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if key.tag == _MERGE and any(each is node or id(each) in self._open for each in merged):
                raise ValueError(
                    f"{self._place(key)}: {prefix.rstrip('.') or 'the file'} contains itself; write its values out"
                )

    def _name(self, key: yaml.Node) -> str:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{self._place(key)}: the key of a setting must be a word; write key: value")
        return str(key.value)

    def _place(self, node: yaml.Node) -> str:
        return f"{self._source}:{node.start_mark.line + 1}" if self._lines else self._source


def _plain(text: str, kind: Any) -> Any:
    """Return the value of an unquoted scalar for a setting of type ``kind``."""
    kinds = set(_members(kind))
    if _NULL.fullmatch(text):
        return None
    if kinds & {str, Path}:
        return text
    if _BOOL.fullmatch(text) and (bool in kinds or Any in kinds):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text) if len(text) <= _MOST_DIGITS else text
    if _FLOAT.fullmatch(text):
        return float(text) if math.isfinite(float(text)) else text
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def _members(kind: Any) -> Iterator[Any]:
    """Yield the types that a value of type ``kind`` may have; a list of texts may also be given as one text."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _members(get_args(kind)[0])
    elif origin in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    elif origin is tuple and str in get_args(kind):
        yield str
    else:
        yield kind


def _element_kinds(kind: Any, count: int) -> list[Any]:
    """Return the types of the elements of a list for a setting of type ``kind``."""
    for member in (kind, *get_args(kind)):
        if get_origin(member) is tuple:
            kinds = [one for one in get_args(member) if one is not Ellipsis]
            return [kinds[min(number, len(kinds) - 1)] for number in range(count)]
    return [Any] * count


def _annotation(kind: Any, keys: list[str]) -> Any:
    """Return the type of the setting at the path ``keys`` below a section; Any where there is none."""
    for key in keys:
        sections = [one for one in _members(kind) if isinstance(one, type) and issubclass(one, Section)]
        fields = sections[0].fields_by_key() if sections else {}
        if key not in fields:
            return Any
        kind = fields[key].annotation
    return kind


def _explain(error: yaml.YAMLError, lines: bool = True) -> str:
    """Return the line of a YAML error and what is wrong there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f" is not valid YAML: {' '.join(str(error).split())}"
    problem = " ".join(part for part in (error.problem, error.context) if part)
    line = f":{error.problem_mark.line + 1}:" if lines else ""
    return f"{line} this is not valid YAML: {problem}"
