"""Say what is wrong with a setting: its value, the constraint, where it was given, and the nearest valid one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vpo_engine.config.section import Section
from vpo_engine.texts import one_line, shortened

ARGUMENT = "argument"
"""The origin of a setting that was given as an argument."""
_WHOLE, _NUMBER, _TRUTH = "a whole number", "a number", "true or false"
_EXPECTED = {
    "int_parsing": _WHOLE,
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": _WHOLE,
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "bool_parsing": _TRUTH,
    "bool_type": _TRUTH,
    "string_type": "text",
    "string_unicode": "text, without halves of surrogate pairs",
    "path_type": "a path",
    "tuple_type": "a list such as [a, b]",
    "dict_type": "a mapping such as {name: 1.0}",
    "finite_number": "a finite number",
}
"""{pydantic's type of error: what the setting must be}."""
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def explain(error: ValidationError, kind: type[Section], origins: Mapping[str, str]) -> str:
    """Return one text for all errors of a configuration of type ``kind``.

    origins: {dotted key: where it was given}; a key that is not in it has its default.
    """
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for item in error.errors():
        keys = tuple(_setting_of(kind, item["loc"]))
        grouped.setdefault(keys, []).append(dict(item))
    return "; ".join(_explain_one(keys, items, kind, origins) for keys, items in grouped.items())


def nearest(word: str, known: Iterator[str] | list[str]) -> str:
    """Return "; did you mean ...?" for the known word that is most like ``word``, or nothing."""
    words = list(known)
    longer = [name for name in words if word and name.startswith(word)]
    found = longer or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _setting_of(kind: type[Section], location: tuple[int | str, ...]) -> Iterator[str]:
    """Yield the keys of the setting at an error's location, without the member of a union and places in lists."""
    fields: Mapping[str, Any] | None = kind.fields_by_key()
    for part in location:
        if fields is None:
            return
        yield str(part)
        sections = list(_sections(fields[str(part)].annotation)) if part in fields else []
        fields = sections[0].fields_by_key() if sections else None


def _explain_one(
    keys: tuple[str, ...], items: list[dict[str, Any]], kind: type[Section], origins: Mapping[str, str]
) -> str:
    key, first = ".".join(keys), items[0]
    if first["type"] == "extra_forbidden":
        place = _place(key, origins).replace(f"{ARGUMENT} ", f"{ARGUMENT}: ")
        return f"{place}unknown key {one_line(shortened(key))}{_nearest_key(keys, kind)}"
    message = " or ".join(dict.fromkeys(_constraint(item) for item in items))
    if not keys:
        return message + _named_places(message, kind, origins)
    if first["type"] == "missing":
        return _missing(key, items, origins)
    if first["type"] in ("value_error", "assertion_error"):
        if isinstance(first["input"], dict):
            own = "" if message.startswith(f"{key}.") else f"{key}: "
            return own + message + _named_places(message, kind, origins, f"{key}.")
        return f"{_place(key, origins)}{key}={shown(first['input'])}: {message}"
    if first["type"] in ("model_type", "model_attributes_type"):
        given = f"{key} is empty" if first["input"] is None else f"{key}={shown(first['input'])} is one value"
        return (
            f"{_place(key, origins)}{given}, but {key} is a group of settings; give them one by one, for example "
            f"{key}.{_first_key(kind, keys)}=..., or leave it out"
        )
    return f"{_place(key, origins)}{key}={shown(first['input'])} {message}"


def _missing(key: str, items: list[dict[str, Any]], origins: Mapping[str, str]) -> str:
    places = [item["loc"][-1] for item in items]
    if isinstance(places[-1], int):
        found = f"{key}={shown(items[0]['input'])}"
        return f"{_place(key, origins)}{found} must have {places[-1] + 1} values"
    return f"{_place(key.rpartition('.')[0], origins)}{key} is missing; give it a value"


def _constraint(item: dict[str, Any]) -> str:
    context, name = item.get("ctx", {}), item["type"]
    if name in _LIMITS:
        words, limit = _LIMITS[name]
        return f"must be {words} {context[limit]:g}"
    if name == "literal_error":
        options = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        known = [text or number for text, number in options]
        hint = nearest(str(item["input"]), known) if isinstance(item["input"], str) else ""
        return f"must be {' or '.join(known) if len(known) < 3 else 'one of ' + ', '.join(known)}{hint}"
    if name in ("too_short", "too_long"):
        expected = context.get("min_length") or context.get("max_length")
        return f"must have {expected} values, got {context['actual_length']}"
    if name == "string_pattern_mismatch" and context["pattern"] == "[A-Za-z0-9]":
        return "must have a letter or a digit"
    if name in _EXPECTED:
        return f"must be {_EXPECTED[name]}"
    return str(item["msg"]).removeprefix("Value error, ")


def _place(key: str, origins: Mapping[str, str]) -> str:
    """Return where a key was given, as the beginning of a message; of a group or a missing key, the nearest setting."""
    while key and key not in origins:
        below = [place for name, place in origins.items() if name.startswith(f"{key}.")]
        if below:
            return _beginning(below[-1])
        key = key.rpartition(".")[0]
    return _beginning(origins[key]) if key else ""


def _beginning(place: str) -> str:
    return f"{place} " if place == ARGUMENT else f"{place}: "


def _named_places(message: str, kind: type[Section], origins: Mapping[str, str], prefix: str = "") -> str:
    """Return where the settings that a message names were given."""
    found = {}
    for name, _ in known_keys(kind):
        for word in {name, name.removeprefix(prefix)}:
            end = r"(?!\w|\.\w)" if "." in word else "="
            if name in origins and re.search(rf"(?<![\w.]){re.escape(word)}{end}", message):
                found[name] = origins[name]
    leaves = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return f" ({', '.join(f'{name}: {found[name]}' for name in leaves)})" if leaves else ""


def shown(value: object) -> str:
    """Return a setting's value as it is written in YAML."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, (str, Path)):
        return one_line(shortened(str(value)))
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000, sort_keys=False)
    return one_line(shortened(text.removesuffix("...\n").strip()))


def _nearest_key(keys: tuple[str, ...], kind: type[Section]) -> str:
    known = dict(known_keys(kind))
    wanted = ".".join(keys)
    if hint := nearest(wanted, list(known)):
        return hint
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    match = difflib.get_close_matches(keys[-1], by_leaf, n=1, cutoff=0.5)
    return (
        f"; did you mean {by_leaf[match[0]]}?"
        if match
        else f"; known keys: {', '.join(kind.fields_by_key())}"
    )


def known_keys(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the type of every setting and of every group of settings."""
    for name, field in kind.fields_by_key().items():
        yield prefix + name, field.annotation
        for section in _sections(field.annotation):
            yield from known_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Yield the group of settings that a field holds, also if it may be null."""
    members = getattr(annotation, "__args__", None) or (annotation,)
    yield from (one for one in members if isinstance(one, type) and issubclass(one, Section))


def _first_key(kind: type[Section], keys: tuple[str, ...]) -> str:
    section: type[Section] = kind
    for key in keys:
        section = next(_sections(section.fields_by_key()[key].annotation))
    return next(iter(section.fields_by_key()))
